"""The measured columns of the table of docs/configurations.md.

  python -m benchmarks.table                                # all of configs/
  python -m benchmarks.table configs/vp/cifar10_ddpmpp.py   # one

It prints millions of parameters (with the frequencies of a Fourier embedding, which are not
trained), and the floating point operations of a forward pass for one image, as XLA counts them
before optimization. It computes and compiles nothing.
"""

import importlib
import pathlib
import sys

import jax
from ml_collections import ConfigDict

from models import utils

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def names() -> list[str]:
  """The names of all configuration files in `configs/`, such as 'vp/ddpm/cifar10'."""
  paths = [path.relative_to(CONFIGS) for path in CONFIGS.glob('*/**/*.py')]
  return sorted(str(path.with_suffix('')) for path in paths if path.name != '__init__.py')


def measure(name: str) -> tuple[float, float]:
  """Millions of parameters, and GFLOP per image, of the network of a configuration."""
  parameters, flop = count(load(name))
  return parameters / 1e6, flop / 1e9


def load(name: str) -> ConfigDict:
  """The configuration of a name of `names`."""
  return importlib.import_module('configs.' + name.replace('/', '.')).get_config()


def count(config: ConfigDict) -> tuple[int, float]:
  """The parameters of the configured network, and its operations for one image."""
  model, states, params = utils.abstract_model(config)
  size = config.data.image_size
  image = jax.ShapeDtypeStruct((1, size, size, config.data.num_channels), 'float32')
  labels = jax.ShapeDtypeStruct((1,), 'float32')
  forward = jax.jit(lambda p, x, t: utils.get_model_fn(model, p, states)(x, t)[0])
  flop = forward.lower(params, image, labels).cost_analysis()['flops']
  return sum(leaf.size for leaf in jax.tree.leaves(params)), flop


def main(paths: list[str]) -> None:
  """Prints a table of the configuration files `paths`, or of all."""
  chosen = [str(pathlib.Path(p).resolve().relative_to(CONFIGS).with_suffix('')) for p in paths]
  print('| configuration | parameters (M) | GFLOP per image |\n|---|---|---|')
  for name in chosen or names():
    parameters, gflop = measure(name)
    print(f'| `{name}` | {parameters:.2f} | {gflop:.3g} |', flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
