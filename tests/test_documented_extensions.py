"""The files of docs/extending do what their pages say, each as a user would run it.

The pages show the files themselves. Networks and schedules are made small here, nothing else.
"""

import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import controllable_generation
import datasets
import evaluation
import formats
import run_lib
import sampling
import sde_lib
from configs.vp import mnist_ddpmpp_continuous
from models import utils as mutils
from modes import evaluations
from modes.preparation import prepare
from runtime import weights
from runtime.errors import UserError
from samplers.base import SAMPLERS
from tests import tiny_config
from tests.exact_scores import end_of_gaussian_flow, gaussian_score
from tests.processes import ROOT

pytestmark = pytest.mark.usefixtures('quickly_compiled')

REGISTRIES = [
  controllable_generation._TASKS,
  datasets.DATASETS,
  evaluation.register_extractor.__self__,
  evaluations.EVALUATIONS,
  formats.FORMATS,
  mutils.MODELS,
  sampling._CORRECTORS,
  sampling._PREDICTORS,
  SAMPLERS,
  sde_lib.SDES,
]


@pytest.fixture
def load(monkeypatch):
  """Runs a file of docs/extending; what it registers is forgotten after the test."""
  for registry in REGISTRIES:
    monkeypatch.setattr(registry, '_entries', dict(registry._entries))
  return lambda name: runpy.run_path(str(ROOT / 'docs' / 'extending' / f'{name}.py'))


def small(config, network='tiny'):
  """The configuration with a small network and a short schedule."""
  sde = config.training.sde
  config.training = tiny_config.get_config().training
  config.training.update(n_iters=1, snapshot_sampling=False, sde=sde)
  config.model.update(name=network, width=8, num_scales=30, ema_rate=0.9)
  config.sampling.update(num_samples=4, batch_size=4)
  config.eval.update(begin_ckpt=1, end_ckpt=1, num_samples=8, batch_size=8, sigma_max_images=0)
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run of the digits, from which several pages sample."""
  workdir = tmp_path_factory.mktemp('run')
  run_lib.train(small(mnist_ddpmpp_continuous.get_config()), workdir)
  return workdir


def drawn(config, workdir):
  """Samples of `--mode=sample`."""
  run_lib.sample(config, workdir)
  settings = config.sampling
  name = f'{settings.task}_{settings.method}_step_1_seed_{config.seed}'
  with np.load(workdir / 'samples' / name / 'samples_0.npz') as file:
    return dict(file)


def error_of_flow(sampler, sde):
  """How far from the exact end of the flow a sampler ends, for data N(0, 0.3^2)."""
  z = sde.prior_sampling(jax.random.PRNGKey(0), (8, 2, 2, 1))
  score_fn = gaussian_score(sde, std=0.3)
  x = sampling.run(sampler, score_fn, jax.random.PRNGKey(1), shape=z.shape, z=z)
  return float(jnp.abs(x - end_of_gaussian_flow(sde, z, sde.sampling_eps, std=0.3)).max())


def test_the_sde_trains_and_samples_gaussian_data(load, tmp_path):
  config = small(load('sde')['get_config']())
  run_lib.train(config, tmp_path)
  assert json.loads((tmp_path / 'config.json').read_text())['model']['b'] == 9.0

  config.sampling.update(method='ddim', n_steps=200, noise_removal=False)
  sde = sde_lib.get_sde(prepare(config))
  assert error_of_flow(sampling.get_sampler(config, sde), sde) < 0.02


def test_the_predictor_converges_as_a_method_of_second_order(load, trained):
  config = small(load('predictor')['get_config']())
  config.sampling.n_steps = 5
  assert np.isfinite(drawn(config, trained)['samples']).all()

  z = jax.random.normal(jax.random.PRNGKey(0), (8, 1))
  coarse, fine = (half_way(sde_lib.VPSDE(N=n), z) for n in (100, 200))
  np.testing.assert_allclose(coarse / fine, 4, rtol=0.2)


def half_way(sde, z):
  """The error of the midpoint rule after half of its steps, at t = 0.5."""
  score_fn, rng = gaussian_score(sde, std=0.3), jax.random.PRNGKey(0)
  predictor = sampling.get_predictor('midpoint')(sde, score_fn)
  step = lambda i, x: predictor.update_fn(rng, x, jnp.full((len(z),), 1 - i / sde.N))[0]
  x = jax.lax.fori_loop(0, sde.N // 2, step, z)
  return jnp.abs(x - end_of_gaussian_flow(sde, z, 0.5, std=0.3)).max()


def test_the_corrector_moves_an_image_whatever_its_batch(load, trained):
  config = small(load('corrector')['get_config']())
  config.seed = 1  # samples of another predictor are there
  assert np.isfinite(drawn(config, trained)['samples']).all()

  sde = sde_lib.VPSDE()
  corrector = sampling.get_corrector('langevin_alone')(sde, gaussian_score(sde), 0.16, 2)
  x = jax.random.normal(jax.random.PRNGKey(0), (2, 4, 4, 1))
  t = jnp.full((2,), 0.5)
  move = lambda x: corrector.update_fn(jax.random.PRNGKey(1), x, t)[0]
  np.testing.assert_array_equal(move(x)[0], move(x.at[1].multiply(9.0))[0])
  assert not np.array_equal(move(x)[0], x[0])


def test_the_sampler_converges_to_the_flow_and_takes_conditions(load, trained):
  file = load('sampler')
  config = small(file['get_config']())
  config.sampling.update(n_steps=5, task='inpaint')
  samples = drawn(config, trained)
  np.testing.assert_array_equal(samples['samples'][:, :, :14], samples['originals'][:, :, :14])

  sde = sde_lib.VPSDE()
  coarse, fine = (error_of_flow(file['EulerFlow'](sde, n, 1e-3), sde) for n in (100, 400))
  assert fine < 0.03
  assert coarse > 2 * fine
  config.sampling.n_steps = 1
  with pytest.raises(UserError, match='at least 2'):
    prepare(config)


def test_the_task_observes_a_blurred_image(load, trained):
  file = load('task')
  config = small(file['get_config']())
  config.sampling.n_steps = 5
  samples = drawn(config, trained)
  blurred = file['blur'](jnp.asarray(samples['originals'] / 127.5 - 1, jnp.float32))
  given = samples['given'] / 127.5 - 1
  np.testing.assert_allclose(given[:, 3:-3, 3:-3], blurred[:, 3:-3, 3:-3], atol=0.1)  # 5 x 0.02


def test_the_network_trains_and_refuses_a_width_that_does_not_fit(load, tmp_path):
  config = small(load('network')['get_config'](), network='plain')
  run_lib.train(config, tmp_path)
  config.model.width = 6
  with pytest.raises(UserError, match='multiple of 4'):
    prepare(config)


def test_the_data_source_trains_and_is_guarded_by_its_fingerprint(load, tmp_path):
  config = small(load('data')['get_config']())
  config.data.length = 64
  run_lib.train(config, tmp_path)
  config.data.length = 65
  with pytest.raises(UserError, match='data'):
    run_lib.train(config, tmp_path)
  source = datasets.get_source(config, 'train')
  np.testing.assert_array_equal(source[3]['image'], source[3]['image'])
  assert source[3]['image'].shape == (28, 28, 1)
  assert {source[i]['label'] for i in range(64)} == {0, 1}


def test_the_extractor_names_the_numbers_of_an_evaluation(load, trained, tmp_path):
  config = small(load('extractor')['get_config']())
  config.eval.update(stats_path=str(tmp_path / 'stats.npz'), stats_split='test', num_samples=64)
  config.eval.update(enable_sampling=True, enable_loss=False, batch_size=64)
  config.sampling.update(method='ddim', n_steps=3)
  run_lib.make_stats(config)
  run_lib.evaluate(config, trained, 'contrasts')
  (report,) = json.loads((trained / 'contrasts' / 'report.json').read_text()).values()
  assert report['fid_contrasts_64'] > 0


def test_the_evaluation_is_a_column_of_the_report(load, trained):
  config = small(load('evaluation')['get_config']())
  run_lib.evaluate(config, trained, 'norms')
  (report,) = json.loads((trained / 'norms' / 'report.json').read_text()).values()
  assert report['norm'] > 0


def test_the_format_is_recognised_and_read(load, tmp_path):
  file = load('format')
  config = small(file['get_config']())
  _, _, shapes = mutils.abstract_model(prepare(config))
  rng = np.random.RandomState(0)
  params = {name: rng.randn(*x.shape) for name, x in weights.flatten(shapes).items()}
  params = {name: x.astype(np.float32) for name, x in params.items()}
  file['write'](tmp_path / 'weights.mine', params, step=10)
  state = run_lib.import_checkpoint(config, tmp_path / 'run', str(tmp_path / 'weights.mine'))
  assert int(state.step) == 10
  np.testing.assert_array_equal(state.params_ema['Conv_0']['kernel'], params['Conv_0/kernel'])
