"""Properties of random configurations and of random damage to files.

PROPERTY_EXAMPLES=20 tries twenty times as many examples, other ones in each run.
"""

import contextlib
import functools
import io
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from faults import targets
from modes import train
from modes.preparation import prepare
from runtime import checkpoints, configuration
from runtime.errors import UserError
from sources import pictures
from sources.arrays import ArraySource
from sources.base import BadPicture, register_dataset
from tests import tiny_config

pytestmark = pytest.mark.usefixtures('quickly_compiled')

TIMES = int(os.environ.get('PROPERTY_EXAMPLES', '1'))


def examples(count):
  """So many examples, the same ones in each run unless more are asked for."""
  return settings(
    max_examples=count * TIMES,
    derandomize=TIMES == 1,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
  )


def check_sentence(error):
  assert '\n' not in str(error)
  assert len(str(error)) < 2000


@register_dataset(name='TwentyPictures')
def twenty_pictures(config, split):
  """Twenty pictures."""
  size, channels = config.data.image_size, config.data.num_channels
  rng = np.random.default_rng(len(split))
  images = rng.integers(0, 256, (20, size, size, channels), np.uint8)
  return ArraySource(images, np.zeros(20, np.int64))


def small_config(changes=()):
  config = tiny_config.get_config()
  config.data.dataset = 'TwentyPictures'
  config.data.image_size = 8
  config.model.num_scales = 30  # the discrete chains need more than beta_max
  config.eval.sigma_max_images = 0
  for name, value in {
    'batch_size': 4,
    'n_iters': 2,
    'log_freq': 2,
    'eval_freq': 2,
    'snapshot_freq': 2,
    'snapshot_freq_for_preemption': 2,
  }.items():
    config.training[name] = value
  for name, value in dict(changes).items():
    section, key = name.split('.')
    with config.unlocked():
      config[section][key] = value
  return config


CHOICES = {
  'training.sde': ['vpsde', 'subvpsde', 'vesde'],
  'training.continuous': [True, False],
  'training.likelihood_weighting': [False, True],
  'training.reduce_mean': [False, True],
  'training.grad_accum_steps': [1, 2],
  'training.n_jitted_steps': [1, 2],
  'training.keep_checkpoints': ['all', 'last:1', 'every:2'],
  'training.on_nonfinite': ['stop', 'skip'],
  'training.snapshot_sampling': [True, True, False],
  'data.centered': [False, True],
  'data.uniform_dequantization': [False, True],
  'data.random_flip': [False, True],
  'data.on_device': [False, True],
  'data.num_channels': [1, 3],
  'model.sigma_max': [50.0, 5.0],
  'model.ema_rate': [0.9, 0.0],
  'optim.optimizer': ['Adam', 'AdamW'],
  'optim.weight_decay': [0.0, 0.1],
  'optim.grad_clip': [1.0, -1.0],
  'optim.warmup': [0, 4],
  'sampling.method': ['pc', 'ode', 'heun', 'ddim', 'dpm_solver++'],
  'sampling.predictor': ['euler_maruyama', 'reverse_diffusion', 'ancestral_sampling', 'none'],
  'sampling.corrector': ['none', 'langevin', 'ald'],
  'sampling.time_grid': ['edm', 'logsnr', 'uniform'],
  'sampling.n_steps': [0, 2],
  'sampling.n_steps_each': [1, 2],
  'sampling.eta': [0.0, 0.5, 1.0],
  'sampling.churn': [0.0, 0.5],
  'sampling.noise_removal': [True, False],
  'sampling.probability_flow': [False, True],
  'sampling.rtol': [1e-2],
  'sampling.atol': [1e-2],
  'sampling.per_image_seeds': [False, True],
}
# Some settings at a time: of combinations of all of them, nine of ten are refused.
COMBINATIONS = st.sets(st.sampled_from(sorted(CHOICES)), min_size=1, max_size=8).flatmap(
  lambda names: st.fixed_dictionaries({x: st.sampled_from(CHOICES[x]) for x in sorted(names)})
)


def newest(workdir):
  """The step and the checksum of everything that the newest state holds."""
  reader = checkpoints.CheckpointReader(workdir / 'checkpoints-meta')
  number = reader.numbers()[-1]
  return reader.step(number), reader.identity(number)


@given(COMBINATIONS)
@examples(2)
def test_every_combination_is_refused_in_a_sentence_or_trains_resumes_and_samples(
  tmp_path_factory, changes
):
  try:
    config = prepare(small_config(changes))
  except UserError as error:
    event(f'refused: {str(error)[:60]}')
    check_sentence(error)
    return
  event('accepted')
  workdir = tmp_path_factory.mktemp('run')
  train.train(config, workdir)
  assert newest(workdir)[0] == 2
  longer = config.copy_and_resolve_references()
  longer.training.n_iters = 4
  train.train(longer, workdir)
  step, resumed = newest(workdir)
  assert step == 4
  drawn = sorted(workdir.glob('samples/iter_*/sample.png'))
  assert len(drawn) == (2 if config.training.snapshot_sampling else 0)
  if TIMES > 1:  # the resumed training is the one that was never interrupted
    whole = tmp_path_factory.mktemp('whole')
    train.train(longer, whole)
    assert newest(whole) == (4, resumed)
    shutil.rmtree(whole)
  shutil.rmtree(workdir)


NAMES = sorted(configuration.flatten(small_config()))
VALUES = st.one_of(
  st.sampled_from([None, '', 'none', '../x', [], [1], True, 0, -1, -0.5, 2**70, 1e300]),
  st.sampled_from([float('nan'), float('inf'), -float('inf')]),
  st.integers(-3, 300),
  st.floats(-2, 2),
  st.text(max_size=5),
)


@given(st.sampled_from(NAMES), VALUES)
@examples(40)
def test_a_wrong_value_is_refused_in_a_sentence(name, value):
  config = small_config()
  section, _, key = name.rpartition('.')
  target = config[section] if section else config
  target = target if key in target else config
  try:
    with config.unlocked(), config.ignore_type():
      target[key] = value
    prepare(config)
  except UserError as error:
    check_sentence(error)


# Files.


def harmed(content, harm):
  """Bytes of which some are changed, and of which the end may be missing."""
  changes, end = harm
  content = bytearray(content)
  for place, byte in changes:
    content[int(place * len(content))] = byte
  return bytes(content[: int(end * len(content))])


HARM = st.tuples(
  st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
  ),
  st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5]),
)


@functools.cache
def encoded_pictures():
  rng = np.random.default_rng(0)
  found = []
  for mode in ('RGB', 'L', 'RGBA', 'P', '1', 'CMYK', 'I;16'):
    image = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).convert(
      'L' if mode == 'I;16' else mode
    )
    image = image.convert(mode) if mode == 'I;16' else image
    for kind in ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF'):
      file = io.BytesIO()
      with contextlib.suppress(OSError, ValueError, KeyError):
        image.save(file, kind)
        found.append(file.getvalue())
  return found


@given(st.integers(0, 1000), HARM, st.sampled_from([1, 3]))
@examples(150)
def test_a_damaged_picture_is_decoded_or_refused(which, harm, channels):
  contents = encoded_pictures()
  with contextlib.suppress(BadPicture):
    decoded = pictures.decode(harmed(contents[which % len(contents)], harm), channels)
    assert decoded.dtype == np.uint8
    assert decoded.shape[2] == channels


@given(st.binary(max_size=300))
@examples(100)
def test_any_bytes_are_no_picture_or_one(content):
  with contextlib.suppress(BadPicture):
    pictures.decode(content, 3)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """A directory with a checkpoint, and what it holds."""
  folder = tmp_path_factory.mktemp('saved')
  tree = {'params': {'a': jax.random.normal(jax.random.PRNGKey(0), (40, 30)), 'b': jnp.arange(7)}}
  with checkpoints.CheckpointDirectory(folder) as directory:
    directory.save(1, 10, tree)
  return folder, tree


@given(st.floats(0, 1, exclude_max=True), HARM)
@examples(40)
def test_a_damaged_checkpoint_is_never_taken_for_an_intact_one(checkpoint, which, harm):
  folder, tree = checkpoint
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  path = files[int(which * len(files))]
  before = path.read_bytes()
  try:
    path.write_bytes(harmed(before, harm) if before else b'x')
    reader = checkpoints.CheckpointReader(folder)
    restored = reader.restore(1, tree)
  except UserError as error:
    check_sentence(error)
  else:
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
  finally:
    path.write_bytes(before)


@pytest.mark.parametrize('target', ['statistics', 'npz', 'export', 'classifier', 'torch', 'flax'])
def test_damaged_and_arbitrary_files_break_no_rule(target, tmp_path):
  seeds = [path.read_bytes() for path in sorted((targets.CORPUS / target).glob('[!b]*'))]
  damaged = st.builds(harmed, st.sampled_from(seeds), HARM)

  @given(damaged | st.binary(max_size=200))
  @examples(25)
  def check(content):
    targets.check(target, content, tmp_path / 'file')

  check()
