"""Draws batches of a trained network under a task, for `--mode=sample` and `score_sde.load`."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

import controllable_generation
import datasets
import sampling
from runtime import parallelism, reporting
from runtime.array_types import Images, Labels, RandomKey
from runtime.rng import stream
from samplers.base import Callback, Condition
from sde_lib import SDE
from train_state import State

Drawn = Float[np.ndarray, 'B H W C']


class TaskSampler:
  """Draws batches under the configured task.

  Args:
    config: the configuration; `sampling`, `data` and what the task needs are read.
    sde: the forward SDE.

  Attributes:
    shape: (B, H, W, C) of a batch.
    scaler: from [0, 1] to the network's range.
    inverse_scaler: from the network's range to [0, 1].
    task: the task.
    nfe: function evaluations of the network in a batch, as far as the sampler fixes them.

  Raises:
    UserError: for settings that contradict one another, before anything is compiled.
  """

  def __init__(self, config: ConfigDict, sde: SDE):
    data = config.data
    self.shape = (config.sampling.batch_size, data.image_size, data.image_size, data.num_channels)
    self.scaler = datasets.get_data_scaler(config)
    self.inverse_scaler = datasets.get_data_inverse_scaler(config)
    self.task = controllable_generation.get_task(config, sde, self.inverse_scaler)
    self._config, self._sde = config, sde
    zeros = jnp.zeros((2, *self.shape[1:])), jnp.zeros(2, int)
    sampling.check(config, sde, self.task.condition(*zeros))
    chosen = sampling.get_sampler(config, sde)
    self.nfe = chosen.n_steps * chosen.nfe_per_step
    self.rng(config.seed, 0)  # which reads settings, too

  def compile(self, model: nn.Module) -> sampling.SamplingFn:
    """The compiled sampler of batches."""
    return sampling.get_sampling_fn(self._config, self._sde, model, self.shape, self.inverse_scaler)

  def rng(self, seed: int, number: int) -> RandomKey:
    """The key of the batch `number`, from 0, or of its images with `sampling.per_image_seeds`."""
    root = stream(seed, 'sample_mode')
    return sampling.batch_rng(self._config, root, number, size=self.shape[0])

  def condition(self, images: Images, labels: Labels) -> Condition:
    """The condition of the task, from images (B, H, W, C) in [0, 1] and labels, (B,)."""
    return self.task.condition(jnp.asarray(self.scaler(images)), jnp.asarray(labels))

  def draw(
    self,
    sampler: sampling.SamplingFn,
    state: State,
    rng: RandomKey,
    *,
    condition: Condition,
    callback: Callback | None = None,
  ) -> tuple[Drawn, int]:
    """Draws a batch.

    Args:
      sampler: the result of `compile`.
      state: the state whose EMA parameters it uses.
      rng: the result of `rng`.
      condition: the result of `condition`.
      callback: see `SamplingFn`.

    Returns:
      Images (B, H, W, C) behind the inverse scaler, in host memory, and the NFE.

    Raises:
      FloatingPointError: if a sample has a value that is NaN or infinite.
    """
    samples, nfe = sampler(
      rng, state, condition=parallelism.replicate(condition), callback=callback
    )
    samples = parallelism.to_host(samples)
    reporting.check_finite(samples, 'samples', int(state.step))
    return samples, nfe


def round_sizes(count: int, batch_size: int) -> list[int]:
  """How many samples each batch keeps: `batch_size` each, and the remainder in the last."""
  return [min(batch_size, count - start) for start in range(0, count, batch_size)]
