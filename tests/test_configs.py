"""Every configuration file, at its full size: valid, and with the network of the paper."""

import importlib

import jax
import pytest

from benchmarks import table
from models import utils
from modes.preparation import prepare

# Numbers of parameters. The first is the published one: the PyTorch port of NCSN++ (cont.) counts
# 62,758,915 too, with the 128 frequencies that are not trained. Ho et al. give 35.7M and 114M for
# their networks, 35,746,307 and 113,673,219: they have two attention blocks more on the way up,
# 2 x 263,680 and 2 x 1,051,648. The others are measured.
PARAMETERS = {
  've/cifar10_ncsnpp_continuous': 62_758_915,
  've/cifar10_ncsnpp_deep_continuous': 107_587_075,
  've/cifar10_ncsnpp': 62_693_251,
  've/bedroom_ncsnpp_continuous': 65_574_549,
  've/celebahq_ncsnpp_continuous': 105_785_896,
  'vp/cifar10_ddpmpp_continuous': 61_804_419,
  'vp/cifar10_ddpmpp_deep_continuous': 106_632_579,
  'vp/ddpm/cifar10': 35_218_947,
  'vp/ddpm/cifar10_unconditional': 32_329_347,
  'vp/ddpm/bedroom': 111_569_923,
  've/ncsnv2/cifar10': 33_970_563,
}


def config_of(name):
  return importlib.import_module('configs.' + name.replace('/', '.')).get_config()


@pytest.mark.slow
@pytest.mark.parametrize('name', table.names())
def test_every_configuration_file_is_valid_at_full_size(name):
  config = prepare(config_of(name))
  # Evaluation finds the checkpoints that it asks for.
  assert config.eval.end_ckpt * config.training.snapshot_freq <= config.training.n_iters


@pytest.mark.parametrize('name', PARAMETERS)
def test_network_has_its_number_of_parameters(name):
  _, _, params = utils.abstract_model(config_of(name))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


def test_measured_columns_of_the_table():
  parameters, gflop = table.measure('vp/mnist_ddpmpp_continuous')
  assert parameters == pytest.approx(0.744225)
  assert 0.1 < gflop < 1
