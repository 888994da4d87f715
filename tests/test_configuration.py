"""Bad input gets one sentence that names the value, the constraint and the fix."""

import pytest
from ml_collections import ConfigDict

from configs.ve.ncsn import cifar10
from configs.vp import mnist_ddpmpp_continuous
from modes.preparation import prepare
from runtime import parallelism, startup, workdir
from runtime.errors import UserError

BAD = [
  ('seed', -1, r'seed=-1 must be a whole number in \[0, 2\^32\)'),
  ('seed', 2**32, r'seed=4294967296 must be a whole number'),
  ('training.sde', 'vp', "Unknown SDE 'vp': choose one of .*subvpsde, vesde, vpsde"),
  ('model.name', 'unet', "Unknown model 'unet': choose one of .*ncsnpp"),
  ('sampling.predictor', 'em', "Unknown predictor 'em': choose one of ancestral_sampling"),
  ('sampling.corrector', 'mala', "Unknown corrector 'mala': choose one of ald, langevin, none"),
  ('sampling.method', 'sde', "Unknown sampler 'sde': choose one of ddim"),
  ('data.dataset', 'MNIST', "Unknown data set 'MNIST': choose one of .*CIFAR10, .*MNIST5K"),
  ('optim.optimizer', 'SGD', "Unknown optimizer 'SGD': choose one of Adam"),
  ('training.bach_size', 8, "Unknown config.training key 'bach_size'.*Did you mean batch_size"),
  ('model.nff', 8, "Unknown config.model key 'nff'.*Did you mean nf"),
  ('training.batch_size', '64', "config.training.batch_size='64' is of type str; .* type int"),
  ('training.continuous', 1, 'config.training.continuous=1 is of type int; .* type bool'),
  ('model.ch_mult', 2, 'config.model.ch_mult=2 is of type int; .* type tuple'),
  ('training.n_jitted_steps', 3, 'n_jitted_steps=3 does not divide training.log_freq=10'),
  ('training.n_iters', 0, 'training.n_iters=0 must be at least 1'),
  ('data.image_size', 30, 'data.image_size=30 cannot be halved 2 times'),
  ('model.nf', 18, 'Group normalization cannot split'),
  ('model.resblock_type', 'resnet', "model.resblock_type='resnet' is unknown: choose one of ddpm"),
  ('model.nonlinearity', 'tanh', "Unknown model.nonlinearity 'tanh': choose one of elu"),
  ('model.num_scales', 15, 'needs more steps than beta_max: got N=15'),
  ('model.beta_min', 30.0, '0 <= beta_min <= beta_max'),
  ('model.num_scales', 0, 'at least one step, got N=0'),
  ('model.ema_rate', 1.0, 'model.ema_rate=1.0 must be in'),
  ('optim.lr', 0.0, 'optim.lr=0.0 must be positive'),
  ('classifier.name', 'vgg', "Unknown classifier 'vgg': choose one of .*wideresnet"),
  ('classifier.depth', 28, "Unknown config.classifier key 'depth'"),
  ('classifier.num_classes', 0, 'classifier.num_classes=0 must be at least 1'),
  ('classifier.lr', 0.0, 'classifier.lr=0.0 must be positive'),
  ('classifier.ema_rate', 1.0, 'classifier.ema_rate=1.0 must be in'),
  ('classifier.sigma_max', 0.01, 'must be positive and less than classifier.sigma_max=0.01'),
]


@pytest.mark.parametrize(('field', 'value', 'message'), BAD, ids=[case[0] for case in BAD])
def test_bad_field_is_refused_in_a_sentence(field, value, message):
  config = mnist_ddpmpp_continuous.get_config()
  config.sampling.corrector = 'langevin'
  *sections, key = field.split('.')
  with config.unlocked(), config.ignore_type():
    (config[sections[0]] if sections else config)[key] = value
  with pytest.raises(UserError, match=message) as raised:
    prepare(config)
  assert '\n' not in str(raised.value)


def test_combinations_that_cannot_work_are_refused(monkeypatch):
  config = mnist_ddpmpp_continuous.get_config()
  config.sampling.predictor = 'ancestral_sampling'
  config.sampling.probability_flow = True
  with pytest.raises(UserError, match='ancestral_sampling has no probability flow'):
    prepare(config)

  config = mnist_ddpmpp_continuous.get_config()
  config.training.sde = 'subvpsde'
  config.training.continuous = False
  with pytest.raises(UserError, match='subVPSDE has no discrete training objective'):
    prepare(config)

  config = mnist_ddpmpp_continuous.get_config()
  config.training.continuous = False
  config.training.likelihood_weighting = True
  with pytest.raises(UserError, match='needs training.continuous=True'):
    prepare(config)

  config = cifar10.get_config()
  config.model.normalization = 'InstanceNorm'
  with pytest.raises(UserError, match="model.normalization='InstanceNorm' is not for the network"):
    prepare(config)

  config = mnist_ddpmpp_continuous.get_config()
  config.sampling.predictor = 'none'
  with pytest.raises(UserError, match='never evaluate the network'):
    prepare(config)

  config = mnist_ddpmpp_continuous.get_config()
  monkeypatch.setattr(parallelism, 'batch_parts', lambda: 5)
  with pytest.raises(UserError, match='batch_size=32 cannot be split over 5 devices'):
    prepare(config)


@pytest.mark.parametrize('section', ['training', 'sampling', 'data', 'model', 'parallel'])
def test_a_number_in_place_of_a_section_is_refused_in_a_sentence(section):
  config = ConfigDict(mnist_ddpmpp_continuous.get_config().to_dict() | {section: 1})
  startup._cpu_devices(config)  # reads it before anything is checked
  with pytest.raises(UserError, match=f'config.{section}=1 is a single value: set it to a sec'):
    prepare(config)


def test_absent_sections_and_keys_take_the_common_defaults():
  config = mnist_ddpmpp_continuous.get_config()
  del config.training.n_jitted_steps
  del config.eval
  complete = prepare(config)
  assert complete.training.n_jitted_steps == 5
  assert complete.eval.batch_size == 1024


def test_run_directory_refuses_a_contradicting_configuration_and_names_the_fields(tmp_path):
  config = mnist_ddpmpp_continuous.get_config()
  workdir.record(config, tmp_path)
  before = (tmp_path / 'config.json').read_bytes()
  config.model.nf = 64
  config.optim.lr = 1e-4
  with pytest.raises(
    UserError, match=r'model.nf \(was \d+, is 64\), optim.lr \(was .*, is 0.0001\)'
  ):
    workdir.record(config, tmp_path)
  assert (tmp_path / 'config.json').read_bytes() == before

  config = mnist_ddpmpp_continuous.get_config()
  config.training.n_iters *= 2
  config.sampling.snr = 0.1
  workdir.record(config, tmp_path)
