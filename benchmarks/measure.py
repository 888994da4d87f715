"""Measures the parts of one configuration: a training step, and evaluations of the network.

An evaluation (NFE) is one of the bare network, of the network inside the configured sampler, or of
the drift and its divergence inside the likelihood. The last two alternate with the bare network,
and matrix products are timed before and after each run, so that a ratio compares what ran at the
same time.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

import datasets
import likelihood
import losses
import sampling
import sde_lib
import train_state
from benchmarks import machine, profile
from benchmarks.request import PARTS, Request
from models import utils as mutils
from modes import train as train_mode
from modes.preparation import prepare
from modes.training_loop import restore_or_init
from runtime import flops, parallelism, startup
from runtime.array_types import Images, PerExample
from runtime.errors import UserError
from runtime.rng import stream
from sde_lib import SDE
from train_state import State

# The fewest steps that a sampler allows are enough. The chains of the VP SDE need more than 20.
_SAMPLER_STEPS = (5, 25, 125)
# An adaptive solver that accepts every step takes three; Heun's has two evaluations in each.
_FEW_EVALUATIONS = {'ode_solver': 'Heun', 'rtol': 1e3, 'atol': 1e3}

# Overrides that the report names elsewhere.
_NAMED = ('data.dataset', 'training.batch_size')

PyTree = Any


@datasets.register_dataset(name='random')
def random_images(config: ConfigDict, split: str) -> datasets.ArraySource:
  """A data set of 64 images of noise."""
  del split
  data = config.data
  shape = (64, data.image_size, data.image_size, data.num_channels)
  images = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
  return datasets.ArraySource(images, np.zeros(64))


def measure(request: Request) -> dict[str, Any]:
  """The report on one configuration, of which everything can be written as JSON.

  Call it before anything else uses JAX: it sets the number of devices.

  Raises:
    UserError: if the configuration or an override of it cannot work.
  """
  logging.set_verbosity(logging.WARNING)
  config = load(request)
  startup.start_jax(config)
  bench = Bench(prepare(config))
  report = {
    'config': request.config,
    'overrides': {k: v for k, v in request.overrides.items() if k not in _NAMED},
    'data': bench.config.data.dataset,
    'batch_size': bench.batch_size,
    'runs': request.runs,
    **machine.description(),
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(bench.state.params)),
    'cold': request.cold,
    'parts': {},
  }
  for name in (name for name in PARTS if name in request.parts):
    report['parts'][name] = _MEASURES[name](bench, request.runs)
  if request.profile:
    rows = profile.trace(pathlib.Path(request.profile), bench.train_step)
    report['profile'] = [
      (kind, machine.digits(s), machine.digits(share)) for kind, s, share in rows
    ]
  return report


def load(request: Request) -> ConfigDict:
  """The configuration of a file, `file.py` or `file.py:argument`, with the overrides.

  Raises:
    UserError: if the file defines no configuration, or an override does not fit it.
  """
  path, _, argument = request.config.partition(':')
  module = _run_file(path)
  if not hasattr(module, 'get_config'):
    raise UserError(f'{path} has no function get_config(): define one that returns a ConfigDict.')
  try:
    config = module.get_config(argument) if argument else module.get_config()
  except TypeError as error:
    raise UserError(
      f'{path}: {error}; write {path}:argument, or leave the argument out.'
    ) from error
  config.unlock()
  for name, value in request.overrides.items():
    section, _, key = name.partition('.')
    if section not in config or not isinstance(config[section], ConfigDict):
      sections = sorted(key for key in config if isinstance(config[key], ConfigDict))
      raise UserError(f'--set {name}: {section!r} is not a section; choose {", ".join(sections)}.')
    try:
      with config[section].unlocked():
        config[section][key] = value
    except TypeError as error:
      raise UserError(
        f'--set {name}={value!r} has the wrong type ({error}): give one of the type that the '
        f'configuration has.'
      ) from error
  return config


def _run_file(path: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location('benchmarked_config', path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


class Bench:
  """What the parts share: the network and its state, the data, and the compiled functions.

  Attributes:
    config: the complete configuration.
    batch_size: of all parts.
    state: the newest state of the training, which a step consumes.
    input_seconds: how long each training step waited for its batches.
  """

  def __init__(self, config: ConfigDict):
    self.config = config
    self.batch_size = config.training.batch_size
    self.sde: SDE = sde_lib.get_sde(config)
    self.model: nn.Module
    self.model, like = train_state.abstract_state(config)
    init = lambda: train_state.init_state(stream(config.seed, 'init'), config)[1]
    self.state: State = restore_or_init([], like, init)
    self.input_seconds: list[float] = []
    data = config.data
    shape = (self.batch_size, data.image_size, data.image_size, data.num_channels)
    ones = np.ones(shape, np.float32), np.ones(self.batch_size, np.float32)
    self.x, self.labels = parallelism.split(ones)
    self.network = jax.jit(self._network)

  @property
  def weights(self) -> tuple[PyTree, PyTree]:
    """What the network is evaluated with: the EMA parameters and the other collections."""
    return self.state.params_ema, self.state.model_state

  def _network(self, weights: tuple[PyTree, PyTree], x: Images, labels: PerExample) -> Images:
    return mutils.get_model_fn(self.model, *weights)(x, labels)[0]

  def forward(self, times: int = 1) -> int:
    """Evaluates the bare network `times` times, one after the other; returns `times`."""
    for _ in range(times):
      jax.block_until_ready(self.network(self.weights, self.x, self.labels))
    return times

  @functools.cached_property
  def forward_flop(self) -> int:
    """The operations of an evaluation of the network."""
    return flops.of(self._network, self.weights, self.x, self.labels)

  @functools.cached_property
  def drift_flop(self) -> int:
    """The operations of an evaluation of the drift and its divergence, with one probe."""

    def drift(weights: tuple[PyTree, PyTree], x: Images) -> PyTree:
      continuous = self.config.training.continuous
      score_fn = mutils.get_score_fn(self.sde, self.model, *weights, False, continuous)
      divergence = likelihood.hutchinson_divergence(x[None])
      augmented = likelihood.Likelihood(self.sde).augmented_drift(score_fn, divergence)
      return augmented(jnp.float32(0.5), (x, jnp.zeros(len(x))))

    return flops.of(drift, self.weights, self.x)

  @functools.cached_property
  def train_step(self) -> Callable[[], int]:
    """Does the training steps of one compiled call, and returns their number."""
    dataset, _, _ = datasets.get_dataset(self.config, self.config.data.uniform_dequantization)
    step = train_mode.compile_train_step(
      losses.build_step_fn(self.config, self.sde, self.model, train=True),
      dataset.preprocess,
      stream(self.config.seed, 'train'),
      table=dataset.table('image'),
    )
    batches = dataset.inputs(0, 'image')
    # On CPU every step is a call, see `training_loop.compile_steps`.
    on_cpu = jax.default_backend() == 'cpu'
    count = 1 if on_cpu else self.config.training.n_jitted_steps

    def run() -> int:
      start = time.perf_counter()
      group = [next(batches) for _ in range(count)]
      self.input_seconds.append(time.perf_counter() - start)
      self.state, _ = step(self.state, group)
      jax.block_until_ready(self.state)
      return count

    return run

  @functools.cached_property
  def sample(self) -> Callable[[], int]:
    """Draws a batch by the configured sampler in few steps, and returns the NFE."""
    config = self.config.copy_and_resolve_references()
    if config.sampling.method == 'ode':
      config.sampling.update(_FEW_EVALUATIONS)
    else:
      steps = _fewest_steps(config, self.sde)
      # Where a call is costly, all of the steps are one.
      config.sampling.update({'n_steps': steps, 'trajectory_every': steps})
    scaler = datasets.get_data_inverse_scaler(config)
    sampler = sampling.get_sampling_fn(config, self.sde, self.model, self.x.shape, scaler)

    def run() -> int:
      x, nfe = sampler(jax.random.PRNGKey(0), self.state)
      jax.block_until_ready(x)
      return nfe

    return run

  @functools.cached_property
  def log_prob(self) -> Callable[[], int]:
    """Takes the likelihood of a batch with one Rademacher probe, and returns the NFE."""
    config = self.config.copy_and_resolve_references()
    config.likelihood.update({'hutchinson_type': 'Rademacher', 'num_probes': 1, **_FEW_EVALUATIONS})
    scaler = datasets.get_data_inverse_scaler(config)
    bits_per_dim = likelihood.from_config(config, self.sde, self.model, inverse_scaler=scaler)

    def run() -> int:
      bits, _, nfe = bits_per_dim(jax.random.PRNGKey(0), self.state, self.x)
      jax.block_until_ready(bits)
      return nfe

    return run


def _fewest_steps(config: ConfigDict, sde: SDE) -> int:
  """The fewest steps, of a few choices, that the sampler allows, or 0 for its default."""
  config = config.copy_and_resolve_references()
  for steps in _SAMPLER_STEPS:
    config.sampling.n_steps = steps
    try:
      sampling.check(config, sde)
    except UserError:
      continue
    return steps
  return 0


@dataclasses.dataclass
class _Runs:
  """Durations for one unit, a step or an NFE, of a part and of the bare network beside it."""

  units: int
  first_call: float
  compilations: machine.Compilations
  resident: int = 0
  part: list[float] = dataclasses.field(default_factory=list)
  forward: list[float] = dataclasses.field(default_factory=list)
  peaks: list[float] = dataclasses.field(default_factory=list)


def _time(bench: Bench, part: Callable[[], int], runs: int, beside_forward: bool) -> _Runs:
  """Times `runs` calls of `part`, each beside a matrix product, after two that are not timed."""
  if beside_forward:
    bench.forward()
  machine.gemm_peak()
  machine.restart_peak_memory()
  compilations = machine.Compilations()
  start = time.perf_counter()
  units = part()
  found = _Runs(units, time.perf_counter() - start, compilations)
  part()
  compilations.stop()
  for _ in range(runs):
    if beside_forward:
      start = time.perf_counter()
      bench.forward(units)
      found.forward.append((time.perf_counter() - start) / units)
    before = machine.gemm_peak()
    start = time.perf_counter()
    part()
    found.part.append((time.perf_counter() - start) / units)
    found.peaks.append((before + machine.gemm_peak()) / 2)
  found.resident = machine.peak_memory()
  return found


def _report(bench: Bench, found: _Runs, flop: int) -> dict[str, Any]:
  """What all parts have in common; `flop` is that of one unit."""
  seconds, peak = statistics.median(found.part), statistics.median(found.peaks)
  # Of each run to the products before and after it, since many machines change their speed.
  shares = [flop / s / p for s, p in zip(found.part, found.peaks, strict=True)]
  return {
    'units_per_run': found.units,
    'seconds': machine.spread(found.part),
    'images_per_second': machine.digits(bench.batch_size / seconds),
    'GFLOP': machine.digits(flop / 1e9),
    'GFLOP_per_second': machine.digits(flop / seconds / 1e9),
    'gemm_peak_GFLOP_per_second': machine.digits(peak / 1e9),
    'share_of_gemm_peak': machine.digits(statistics.median(shares)),
    'first_call_seconds': machine.digits(found.first_call),
    'compile_seconds': machine.digits(found.compilations.seconds),
    'programs': found.compilations.programs,
    'programs_from_cache': found.compilations.from_cache,
    'compiled_MiB': machine.digits(found.compilations.memory() / 2**20),
    'resident_MiB': machine.digits(found.resident / 2**10),
  }


def _train(bench: Bench, runs: int) -> dict[str, Any]:
  """A step counts as three forward passes: one forward, two for the gradient."""
  found = _time(bench, bench.train_step, runs, beside_forward=False)
  waiting = statistics.median(bench.input_seconds[-runs:]) / found.units
  report = _report(bench, found, 3 * bench.forward_flop)
  share = waiting / statistics.median(found.part)
  return {**report, 'input_share_of_step': machine.digits(share)}


def _forward(bench: Bench, runs: int) -> dict[str, Any]:
  return _report(bench, _time(bench, bench.forward, runs, False), bench.forward_flop)


def _sampler(bench: Bench, runs: int) -> dict[str, Any]:
  found = _time(bench, bench.sample, runs, beside_forward=True)
  forward = statistics.median(found.forward)
  return {
    **_report(bench, found, bench.forward_flop),
    'forward_seconds': machine.digits(forward),
    'sampler_share_of_forward': machine.digits(forward / statistics.median(found.part)),
  }


def _likelihood(bench: Bench, runs: int) -> dict[str, Any]:
  found = _time(bench, bench.log_prob, runs, beside_forward=True)
  forward = statistics.median(found.forward)
  return {
    **_report(bench, found, bench.drift_flop),
    'forward_seconds': machine.digits(forward),
    'likelihood_forwards': machine.digits(statistics.median(found.part) / forward),
  }


_MEASURES = {
  'train': _train,
  'forward': _forward,
  'sampler': _sampler,
  'likelihood': _likelihood,
}
