"""Whole evaluations: kills, processes, refusals.

Where a process of its own is not what a test is about, the evaluation runs in that of the test,
which has imported JAX and the network before. The data are few pictures of a folder.
"""

import json
import random
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

import datasets
import evaluation
import likelihood
import losses
import run_lib
import sampling
import sde_lib
import train_state
from modes import evaluate as evaluation_run
from modes import evaluations
from modes import stats as stats_mode
from modes.preparation import prepare
from runtime import checkpoints, configuration
from runtime.checkpoints import CheckpointDirectory, CheckpointReader, DamagedCheckpoint
from runtime.errors import UserError
from runtime.rng import stream
from tests import tiny_config
from tests.processes import finish_together, run, start, start_together, wait_for


@pytest.fixture(scope='module', autouse=True)
def _compile_quickly(quickly_compiled):
  """In the processes that are started here as well."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    yield


BATCH, TEST_SIZE = 16, 100  # six batches and a part of a seventh
BOTH = {'eval.begin_ckpt': 3, 'eval.end_ckpt': 4}
ALL = {
  'eval.enable_bpd': True,
  'eval.bpd_repeats': 2,
  'eval.enable_sampling': True,
  'eval.batch_size': BATCH,
  'eval.num_samples': 38,  # two batches and a part of a third
  'likelihood.eps': 0.9,  # the lowest NFE
  'likelihood.ode_solver': 'RK23',
  **BOTH,
}


def flags(settings):
  """Settings as a command line has them."""
  return [f'--config.{name}={value}' for name, value in settings.items()]


def configured(settings):
  """Settings as a call has them."""
  config = tiny_config.get_config()
  for name, value in settings.items():
    section, field = name.split('.')
    config[section][field] = value
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Four checkpoints, the data, and the statistics of the test split."""
  workdir = tmp_path_factory.mktemp('trained')
  with np.load(datasets.ASSETS / 'mnist5k.npz') as digits:
    for split, count in (('train', 20), ('test', TEST_SIZE)):
      (workdir / 'pictures' / split).mkdir(parents=True)
      for i, pixels in enumerate(digits[f'{split}_images'][:count, ..., 0]):
        Image.fromarray(pixels).save(workdir / 'pictures' / split / f'{i:03d}.png')
  run_lib.train(configured(data(workdir) | {'training.snapshot_sampling': False}), workdir)
  stats_mode.write_stats(prepare(configured(stats(workdir))))
  return workdir


@pytest.fixture
def workdir(trained, tmp_path):
  """A copy of the run that a test may change."""
  shutil.copytree(trained, tmp_path / 'run')
  return tmp_path / 'run'


def data(trained):
  return {'data.dataset': 'ImageFolder', 'data.path': f'{trained}/pictures'}


def stats(trained):
  """The data and their statistics."""
  of_data = {'eval.stats_path': f'{trained}/stats.npz', 'eval.stats_split': 'test'}
  return data(trained) | of_data


@pytest.fixture(scope='module')
def uninterrupted(trained, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
  shutil.copytree(trained, workdir)
  run(workdir, *flags(ALL | stats(trained)), mode='eval')
  return workdir / 'eval'


def report(folder):
  return json.loads((folder / 'report.json').read_text())


def arrays(folder):
  """Every array of every file."""
  return {
    (str(path.relative_to(folder)), key): array
    for path in sorted(folder.rglob('*.npz'))
    for key, array in np.load(path).items()
  }


def assert_same_evaluation(folder, reference):
  """The report, and every sample, feature and loss behind it, bit for bit."""
  assert report(folder) == report(reference)
  assert (folder / 'report.csv').read_text() == (reference / 'report.csv').read_text()
  ours, theirs = arrays(folder), arrays(reference)
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=str(name))


def test_evaluation_leaves_the_documented_files(uninterrupted):
  names = {str(path.relative_to(uninterrupted)) for path in uninterrupted.rglob('*.*')}
  expected = {'report.json', 'report.csv', 'meta.json', 'stdout.txt', '.lock'}
  for n in (3, 4):
    expected |= {f'ckpt_{n}_loss.npz', f'report_{n}.npz'}
    expected |= {f'test_ckpt_{n}_bpd_{r}.npz' for r in range(14)}
    for r in range(3):
      expected |= {f'ckpt_{n}_host_0/{kind}_{r}.npz' for kind in ('samples', 'statistics')}
  assert names == expected
  samples = [np.load(uninterrupted / f'ckpt_4_host_0/samples_{r}.npz')['samples'] for r in range(3)]
  assert [len(part) for part in samples] == [16, 16, 6]
  entry = report(uninterrupted)['4']
  assert entry['step'] == 40
  assert entry['reference'] == f'ImageFolder:pictures/test/{TEST_SIZE}'
  assert np.isfinite([entry['loss'], entry['fid_tiny_38'], entry['kid_tiny_38']]).all()
  header, *rows = (uninterrupted / 'report.csv').read_text().splitlines()
  assert header.startswith('checkpoint,step,loss,bpd_test,fid_tiny_38')
  assert [row.split(',')[:2] for row in rows] == [['3', '30'], ['4', '40']]


def restored(workdir, number):
  """The configuration, SDE, network and state of a checkpoint."""
  config = prepare(configured(ALL | data(workdir)))
  model, like = train_state.abstract_state(config)
  with CheckpointDirectory(workdir / 'checkpoints') as directory:
    return config, sde_lib.get_sde(config), model, directory.restore(number, like)


def images_of(source):
  return np.stack([source[i]['image'] for i in range(len(source))])


def test_the_loss_counts_every_test_image_once(trained, uninterrupted):
  """The last batch is smaller; and from the random numbers of each one's place."""
  config, sde, model, state = restored(trained, 4)
  _, dataset, _ = datasets.get_dataset(config, evaluation=True)
  step_fn = losses.build_step_fn(config, sde, model, train=False)
  root = jax.random.fold_in(stream(config.seed, 'eval'), 40)

  @jax.jit
  def loss(rng, images):
    data_rng, step_rng = jax.random.split(rng)
    return step_fn((step_rng, state), {'image': dataset.preprocess(data_rng, images)})[1]

  images = images_of(dataset.source)
  total = sum(
    len(part) * float(loss(jax.random.fold_in(root, i), part))
    for i, part in enumerate(np.split(images, range(BATCH, TEST_SIZE, BATCH)))
  )
  np.testing.assert_allclose(report(uninterrupted)['4']['loss'], total / TEST_SIZE, rtol=1e-5)


def test_bits_per_dim_are_a_mean_over_each_test_image_twice(trained, uninterrupted):
  bpd = [np.load(uninterrupted / f'test_ckpt_4_bpd_{r}.npz')['bpd'] for r in range(14)]
  assert [len(part) for part in bpd] == 2 * ([16] * 6 + [4])
  mean = np.concatenate(bpd).mean(dtype=np.float64)
  np.testing.assert_allclose(report(uninterrupted)['4']['bpd_test'], mean, rtol=1e-9)

  config, sde, model, state = restored(trained, 4)
  inverse_scaler = datasets.get_data_inverse_scaler(config)
  likelihood_fn = likelihood.from_config(config, sde, model, inverse_scaler=inverse_scaler)
  root = jax.random.fold_in(stream(config.seed, 'bpd'), 40)
  images = images_of(datasets.get_source(config, 'test'))
  expected, _, _ = likelihood_fn(jax.random.fold_in(root, 9), state, images[32:48])
  np.testing.assert_allclose(bpd[9], expected, rtol=1e-5)


def test_bits_per_dim_below_zero_come_with_a_warning(trained, tmp_path):
  config, sde, model, _ = restored(trained, 4)
  config.eval.bpd_repeats = 1
  task = evaluations.BitsPerDim(config, tmp_path, sde, model)
  for r in range(7):
    np.savez(tmp_path / f'test_ckpt_4_bpd_{r}.npz', bpd=np.full(16, 0.5 - (r == 0) * 5.6875))
  numbers = task.numbers(4)
  np.testing.assert_allclose(numbers['bpd_test'], -0.3125)
  assert numbers['bpd_warnings'] == [
    '-0.312 bits/dim cannot be: set likelihood.rtol and likelihood.atol lower.'
  ]
  np.savez(tmp_path / 'test_ckpt_4_bpd_0.npz', bpd=np.zeros(16))
  assert 'bpd_warnings' not in task.numbers(4)


def test_samples_are_those_of_the_configured_sampler(trained, uninterrupted):
  """The numbers of the report belong to the samples beside it."""
  config = prepare(configured(stats(trained)))
  extractor = evaluation.get_extractor(config)
  of_data = evaluation.load_dataset_stats(config, extractor)
  samples = [np.load(uninterrupted / f'ckpt_4_host_0/samples_{r}.npz')['samples'] for r in range(3)]
  outputs = extractor(np.concatenate(samples))
  numbers, _ = evaluation.sample_metrics('tiny', of_data, **outputs)
  entry = report(uninterrupted)['4']
  for name, value in numbers.items():
    np.testing.assert_allclose(entry[name], value, rtol=1e-4, atol=1e-7)


def kill_after(workdir, files, settings, delay=0.0):
  """kill -9 as soon as the evaluation has written `files` files."""
  process = start(workdir, *flags(settings), mode='eval')
  folder = workdir / 'eval'
  wait_for(lambda: len(list(folder.rglob('*.npz'))) >= files, process)
  time.sleep(delay)
  process.kill()
  process.communicate()


@pytest.mark.slow
def test_killed_between_two_files_of_a_round_it_ends_in_the_same_report(
  trained, uninterrupted, tmp_path
):
  """What a kill leaves: samples without their statistics, and a temporary file."""
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted.parent, workdir)
  folder = workdir / 'eval'
  for name in ('report.json', 'report_3.npz', 'report_4.npz', 'ckpt_4_loss.npz'):
    (folder / name).unlink()
  for r in range(10, 14):
    (folder / f'test_ckpt_3_bpd_{r}.npz').unlink()
  (folder / 'ckpt_4_host_0/statistics_1.npz').unlink()
  (folder / 'ckpt_4_host_0/statistics_2.npz').unlink()
  (folder / 'ckpt_4_host_0/samples_2.npz').rename(folder / 'ckpt_4_host_0/.samples_2.npz-abc')
  run_lib.evaluate(configured(ALL | stats(trained)), workdir)
  (folder / 'ckpt_4_host_0/.samples_2.npz-abc').unlink()
  assert_same_evaluation(folder, uninterrupted)


@pytest.mark.slow
def test_killed_at_two_random_moments_it_ends_in_the_same_report(trained, uninterrupted, workdir):
  rng = random.Random(0)
  written = len(list(uninterrupted.rglob('*.npz')))
  for files in sorted(rng.sample(range(1, written), 2)):
    kill_after(workdir, files, ALL | stats(trained), delay=rng.uniform(0, 0.05))
  run_lib.evaluate(configured(ALL | stats(trained)), workdir)
  assert_same_evaluation(workdir / 'eval', uninterrupted)


def assert_close_evaluation(folder, reference):
  ours, theirs = report(folder), report(reference)
  assert ours.keys() == theirs.keys()
  for number in ours:
    assert ours[number].keys() == theirs[number].keys()
    for key, value in theirs[number].items():
      if isinstance(value, float):
        np.testing.assert_allclose(ours[number][key], value, rtol=1e-3, atol=1e-4, err_msg=key)
      else:
        assert ours[number][key] == value


@pytest.mark.slow
def test_two_processes_share_the_work_and_give_the_report_of_one(trained, uninterrupted, workdir):
  finish_together(start_together(workdir, *flags(ALL | stats(trained)), mode='eval'))
  assert_close_evaluation(workdir / 'eval', uninterrupted)


@pytest.mark.slow
def test_eight_devices_give_the_report_of_one(trained, uninterrupted, workdir):
  run(workdir, *flags(ALL | stats(trained)), mode='eval', devices=8)
  assert_close_evaluation(workdir / 'eval', uninterrupted)


def refusal(workdir, monkeypatch, message, folder='eval', **settings):
  """Asserts that the evaluation is refused, and before anything is drawn."""
  config = configured(stats(workdir))
  config.eval.begin_ckpt = config.eval.end_ckpt = 4
  config.eval.enable_sampling = True
  config.eval.num_samples = 100
  for key, value in settings.items():
    section, name = key.split('__')
    config[section][name] = value
  with monkeypatch.context() as patch:
    patch.setattr(CheckpointReader, 'restore', None)
    with pytest.raises(UserError, match=message):
      run_lib.evaluate(config, workdir, folder)
  assert not list(workdir.glob('eval/ckpt*'))


NOTHING = {f'eval__enable_{name}': False for name in ('loss', 'bpd', 'sampling')}


def test_what_cannot_be_evaluated_is_refused_before_sampling(workdir, monkeypatch, tmp_path):
  (workdir / 'file').write_text('')
  for message, settings in (
    ('does not fit the configuration: split', {'eval__stats_split': 'train'}),
    ('no statistics of the data at', {'eval__stats_path': str(tmp_path / 'no.npz')}),
    ('weights of the Inception network are not at', {'eval__extractor': 'inception'}),
    ("Unknown extractor 'vgg': choose one of", {'eval__extractor': 'vgg'}),
    ('nothing can be written to', {'folder': 'file/eval'}),
    ("eval.bpd_dataset='valid' must be", {'eval__enable_bpd': True, 'eval__bpd_dataset': 'valid'}),
    (
      "sampling.task='inpaint' is not for --mode=eval, .*use --mode=sample",
      {'sampling__task': 'inpaint'},
    ),
    ('No evaluation is enabled: set one of eval.enable_loss', NOTHING),
    ('eval.bpd_repeats=-1 must be', {'eval__enable_bpd': True, 'eval__bpd_repeats': -1}),
    ("--eval_folder='../eval' must be a folder inside", {'folder': '../eval'}),
    ("--eval_folder='eval/..' must be a folder inside", {'folder': 'eval/..'}),
    ("--eval_folder='' must be a folder inside", {'folder': ''}),
    (f"--eval_folder='{tmp_path}' must be a folder inside", {'folder': str(tmp_path)}),
    ("--eval_folder='samples' has other files of the run", {'folder': 'samples'}),
    ("--eval_folder='checkpoints/a' has other files of the run", {'folder': 'checkpoints/a'}),
    ('1 samples have no covariance', {'eval__num_samples': 1}),
    ('eval.begin_ckpt=5 is greater than eval.end_ckpt=4', {'eval__begin_ckpt': 5}),
    (r'no checkpoints \[5, 6\]: it has \[1, 2, 3, 4\]', {'eval__end_ckpt': 6}),
    (
      'eval.end_ckpt=6 is more than training will save: training.n_iters=40 ends at checkpoint 4',
      {'eval__end_ckpt': 6, 'eval__wait_seconds': 5},
    ),
    (
      'no checkpoint 5 after eval.wait_seconds=1.*is training still running',
      {
        'eval__begin_ckpt': 5,
        'eval__end_ckpt': 5,
        'eval__wait_seconds': 1,
        'training__n_iters': 50,
      },
    ),
  ):
    refusal(workdir, monkeypatch, message, **settings)
  with pytest.raises(UserError, match='--workdir must be that of a run'):
    run_lib.evaluate(tiny_config.get_config(), tmp_path / 'nothing')


def test_results_of_other_settings_or_checkpoints_are_not_mixed(uninterrupted, monkeypatch):
  workdir = uninterrupted.parent
  config = configured(ALL | stats(workdir))
  config.eval.batch_size = 32
  with pytest.raises(UserError, match=r'eval.batch_size \(was 16, is 32\).*--eval_folder'):
    run_lib.evaluate(config, workdir)
  config.eval.batch_size = BATCH
  with monkeypatch.context() as patch:
    patch.setattr(CheckpointReader, 'identity', lambda self, number: 'another')
    with pytest.raises(UserError, match='another checkpoint 3, of step 30'):
      run_lib.evaluate(config, workdir)


def evaluated(workdir, monkeypatch, **settings):
  """Evaluates checkpoint 4 again with other settings; what is computed fails."""
  config = configured(ALL | stats(workdir) | {'eval.begin_ckpt': 4})
  for key, value in settings.items():
    section, name = key.split('__')
    config[section][name] = value
  with monkeypatch.context() as patch:
    patch.setattr(CheckpointReader, 'restore', None)
    run_lib.evaluate(config, workdir)


def test_only_settings_that_the_numbers_depend_on_must_stay(uninterrupted, monkeypatch):
  """The numbers are there: the same command, or one that differs in nothing, computes nothing."""
  workdir, before = uninterrupted.parent, report(uninterrupted)
  evaluated(workdir, monkeypatch)
  evaluated(
    workdir,
    monkeypatch,
    sampling__mask='left',
    sampling__superres_factor=2,
    sampling__label=3,
    sampling__guidance_scale=2.0,
    sampling__num_samples=7,
    sampling__batch_size=32,
    sampling__trajectory_every=2,
    sampling__eta=0.5,  # of ddim
    sampling__rtol=1e-3,  # of ode
  )
  assert report(uninterrupted) == before
  for key, value, message in (
    ('sampling__snr', 0.2, r'sampling.snr \(was 0.16, is 0.2\)'),
    ('sampling__n_steps', 1, r'sampling.n_steps \(was 0, is 1\)'),
    ('sampling__per_image_seeds', True, r'sampling.per_image_seeds \(was False, is True\)'),
    ('eval__num_samples', 100, r'eval.num_samples \(was 38, is 100\)'),
    ('sampling__method', 'ddim', r"settings: sampling.method \(was 'pc', is 'ddim'\); set"),
  ):
    with pytest.raises(UserError, match=message):
      evaluated(workdir, monkeypatch, **{key: value})


def test_an_evaluation_that_recorded_all_settings_of_sampling_continues(
  uninterrupted, monkeypatch, tmp_path
):
  """As earlier versions did."""
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted.parent, workdir)
  meta = json.loads((workdir / 'eval/meta.json').read_text())
  flat = configuration.flatten(prepare(configured(ALL | data(workdir))))
  sampling_settings = {key: value for key, value in flat.items() if key.startswith('sampling.')}
  meta['settings']['sampling'] |= sampling_settings
  (workdir / 'eval/meta.json').write_text(json.dumps(meta))
  with pytest.raises(UserError, match='sampling.snr'):
    evaluated(workdir, monkeypatch, sampling__snr=0.2)
  evaluated(workdir, monkeypatch, sampling__mask='left')


DAMAGES = {
  'empty': lambda data: b'',
  'half': lambda data: data[: len(data) // 2],
  'a hole': lambda data: data[:60] + bytes(80) + data[140:],
}


def test_damaged_files_of_results_are_computed_again(trained, uninterrupted, tmp_path, caplog):
  """With a warning, and only these: the others are not written again."""
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted.parent, workdir)
  folder = workdir / 'eval'
  damaged = {
    'ckpt_3_loss.npz': 'empty',
    'test_ckpt_3_bpd_2.npz': 'half',
    'test_ckpt_3_bpd_9.npz': 'empty',
    'test_ckpt_4_bpd_13.npz': 'a hole',
    'ckpt_3_host_0/samples_1.npz': 'a hole',
    'ckpt_3_host_0/statistics_1.npz': 'half',
    'report_3.npz': 'empty',
    'report_4.npz': 'half',
    'report.json': 'half',
  }
  for name, damage in damaged.items():
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(DAMAGES[damage](data))
  times = {path: path.stat().st_mtime_ns for path in folder.rglob('*.npz')}
  run_lib.evaluate(configured(ALL | stats(trained)), workdir)
  for name in damaged.keys() - {'report.json'}:
    assert f'{folder / name} was damaged; its results have been computed again' in caplog.text
  rewritten = {path for path in times if path.stat().st_mtime_ns != times[path]}
  assert rewritten == {folder / name for name in damaged if name.endswith('.npz')}
  assert report(folder) == report(uninterrupted)
  ours, theirs = arrays(folder), arrays(uninterrupted)
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=str(name))


@pytest.mark.parametrize('damage', [*DAMAGES, 'a list', 'a word', 'missing'])
def test_a_damaged_report_is_made_again_and_a_damaged_record_refused(
  damage, uninterrupted, monkeypatch, tmp_path, caplog
):
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted.parent, workdir)
  change = DAMAGES | {'a list': lambda data: b'[1, 2]', 'a word': lambda data: b'{"x": {}}'}

  def spoil(name):
    path = workdir / 'eval' / name
    if damage == 'missing':
      path.unlink()
    else:
      path.write_bytes(change[damage](path.read_bytes()))

  spoil('report.json')
  evaluated(workdir, monkeypatch)
  assert report(workdir / 'eval') == report(uninterrupted)  # of both checkpoints
  warned = (
    'report.json is damaged: its numbers are read again from the files of loss, bpd, sampling'
  )
  assert (warned in caplog.text) == (damage != 'missing')
  spoil('meta.json')
  with pytest.raises(UserError, match='meta.json is missing or damaged, .*another --eval'):
    evaluated(workdir, monkeypatch)


def test_images_that_are_not_those_of_the_run_are_reported(workdir, caplog):
  pictures = workdir / 'pictures' / 'test'
  for path in pictures.iterdir():
    Image.open(path).point(lambda level: 255 - level).save(path)
  settings = BOTH | {'data.dataset': 'ImageFolder', 'data.path': f'{workdir}/pictures'}
  run_lib.evaluate(configured(settings), workdir)
  assert 'The images of the evaluation loss are not those that ' in caplog.text


def test_samples_that_are_not_finite_stop_it_before_they_are_written(workdir, monkeypatch):
  def broken(config, sde, model, shape, inverse_scaler):
    return lambda rng, state, callback: (jax.numpy.full(shape, np.nan), 1)

  config = configured(data(workdir))
  config.eval.begin_ckpt = config.eval.end_ckpt = 4
  config.eval.enable_sampling, config.eval.enable_loss = True, False
  config.eval.extractor = 'none'
  config = prepare(config)
  monkeypatch.setattr(sampling, 'get_sampling_fn', broken)
  with pytest.raises(FloatingPointError, match='samples of the checkpoint of step 40'):
    evaluation_run.evaluate(config, workdir, 'eval')
  assert not list(workdir.glob('eval/ckpt*'))


@pytest.mark.slow
def test_it_waits_for_a_checkpoint_that_is_still_to_come(workdir, caplog):
  caplog.set_level('INFO')
  saved = workdir / 'checkpoints' / 'checkpoint_4'
  saved.rename(workdir / 'later')
  announced = threading.Event()

  def save_when_waited_for():
    deadline = time.monotonic() + 50
    while 'for checkpoint 4' not in caplog.text and time.monotonic() < deadline:
      time.sleep(0.01)
    if 'for checkpoint 4' in caplog.text:
      announced.set()
    (workdir / 'later').rename(saved)

  training = threading.Thread(target=save_when_waited_for)
  training.start()
  run_lib.evaluate(configured(BOTH | data(workdir) | {'eval.wait_seconds': 60}), workdir)
  training.join()
  assert announced.is_set()
  assert set(report(workdir / 'eval')) == {'3', '4'}


def test_a_checkpoint_that_training_removes_as_it_is_read_is_left_out(workdir, monkeypatch, caplog):
  restore = checkpoints.restore

  def restore_late(snapshots, number, like):
    if number == 3:
      shutil.rmtree(workdir / 'checkpoints' / 'checkpoint_3')
    return restore(snapshots, number, like)

  monkeypatch.setattr(checkpoints, 'restore', restore_late)
  kept = {'training.keep_checkpoints': 'last:1'}
  run_lib.evaluate(configured(BOTH | data(workdir) | kept), workdir)
  assert 'Checkpoint 3 is left out: training removed it as it was read.' in caplog.text
  assert set(report(workdir / 'eval')) == {'4'}


def test_a_checkpoint_that_is_damaged_as_it_is_read_is_named(workdir):
  for path in (workdir / 'checkpoints' / 'checkpoint_3').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      path.write_bytes(path.read_bytes()[:-1])
  kept = {'training.keep_checkpoints': 'last:2'}
  with pytest.raises(DamagedCheckpoint, match='checkpoint_3'):
    run_lib.evaluate(configured(BOTH | data(workdir) | kept), workdir)


def test_without_an_extractor_samples_are_only_drawn(workdir):
  settings = {
    'eval.extractor': 'none',
    'eval.enable_sampling': True,
    'eval.enable_loss': False,
    'eval.num_samples': 70,
    'eval.begin_ckpt': 4,
  }
  run_lib.evaluate(configured(data(workdir) | settings), workdir)
  assert not list((workdir / 'eval').glob('report_*'))
  samples = [np.load(path)['samples'] for path in workdir.glob('eval/ckpt_4_host_0/samples_*')]
  assert sorted(map(len, samples)) == [6, 64]
