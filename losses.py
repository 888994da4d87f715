"""Training objectives, and one training or evaluation step.

Every loss function has the form `loss_fn(rng, params, states, batch) -> (loss, new states)`. The
loss is a scalar. `batch` is {'image': (B, H, W, C)} with images in the network's range; evaluation
adds {'weight': (B,)}, which is zero for examples that do not count.

Equation numbers are those of Song et al., "Score-based generative modeling through stochastic
differential equations", ICLR 2021, https://arxiv.org/abs/2011.13456. Likelihood weighting is from
Song, Durkan, Murray and Ermon, "Maximum likelihood training of score-based diffusion models",
NeurIPS 2021, https://arxiv.org/abs/2101.09258.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from models import utils as mutils
from runtime import parallelism
from runtime.array_types import Array, Batch, PerExample, RandomKey, Scalar
from runtime.errors import UserError
from sde_lib import SDE, VESDE, VPSDE, batch_mul
from train_state import (
  Observer,
  State,
  get_optimizer,
  is_finite,
  optimization_manager,
  register_optimizer,
  skip_unless,
)

__all__ = [
  'LossFn',
  'Objective',
  'State',
  'StepFn',
  'build_step_fn',
  'get_ddpm_loss_fn',
  'get_discrete_loss_fn',
  'get_optimizer',
  'get_sde_loss_fn',
  'get_smld_loss_fn',
  'get_step_fn',
  'optimization_manager',
  'register_optimizer',
]

PyTree = Any
Examples = Mapping[str, Array]
LossFn = Callable[[RandomKey, PyTree, PyTree, Examples], tuple[Scalar, PyTree]]
Carry = tuple[RandomKey, State]
Numbers = dict[str, Scalar]  # of a step, by name
StepFn = Callable[[Carry, Examples], tuple[Carry, Scalar | Numbers]]


def _reduce(squares: Batch, reduce_mean: bool) -> PerExample:
  """The mean over the entries of each example, or half their sum."""
  squares = squares.reshape(squares.shape[0], -1)
  return jnp.mean(squares, axis=-1) if reduce_mean else 0.5 * jnp.sum(squares, axis=-1)


def _batch_mean(losses: PerExample, batch: Examples) -> Scalar:
  """The mean over examples, weighted by `batch['weight']` if the batch has it."""
  return jnp.average(losses, weights=batch.get('weight'))


def _draws(rng: RandomKey) -> tuple[RandomKey, RandomKey, RandomKey]:
  """Keys for the time, the noise and the dropout."""
  # The order of the splits is part of every recorded loss.
  rng, time_rng = jax.random.split(rng)
  rng, noise_rng = jax.random.split(rng)
  _, dropout_rng = jax.random.split(rng)
  return time_rng, noise_rng, dropout_rng


@dataclasses.dataclass(frozen=True)
class Objective:
  """A training objective in two parts, so that the second may see a part of the batch at a time.

  Called as `objective(rng, params, states, batch)`, it is a loss function.

  Attributes:
    perturb: `(rng, images) -> (examples, rng for dropout)`; it draws all that is random about the
      examples, arrays with a leading axis (B,).
    losses_of: `(params, states, examples, rng) -> (losses (B,), new states)`.
  """

  perturb: Callable[[RandomKey, Batch], tuple[Examples, RandomKey]]
  losses_of: Callable[[PyTree, PyTree, Examples, RandomKey], tuple[PerExample, PyTree]]

  def __call__(
    self, rng: RandomKey, params: PyTree, states: PyTree, batch: Examples
  ) -> tuple[Scalar, PyTree]:
    """The loss of a batch and the new states."""
    examples, dropout_rng = self.perturb(rng, batch['image'])
    losses, new_states = self.losses_of(params, states, examples, dropout_rng)
    return _batch_mean(losses, batch), new_states

  def value_and_grad(
    self, rng: RandomKey, params: PyTree, states: PyTree, batch: Examples, num_parts: int = 1
  ) -> tuple[tuple[Scalar, PyTree], PyTree]:
    """Loss, new states and gradient in `params`, of `num_parts` parts of the batch in turn.

    With more than one part only the activations of one are in memory at a time. All draws but those
    of dropout are those of the whole batch.
    """
    if num_parts == 1:
      grad_fn = jax.value_and_grad(self.__call__, argnums=1, has_aux=True)
      return grad_fn(rng, params, states, batch)
    examples, dropout_rng = self.perturb(rng, batch['image'])
    # Part i has the examples i, i + num_parts, ...: every device keeps its own.
    split = lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)
    parts = jax.tree.map(split, examples)

    def mean_loss(params, states, part, rng):
      losses, new_states = self.losses_of(params, states, part, rng)
      return jnp.mean(losses), new_states

    def add(carry, numbered):
      (states, total), (i, part) = carry, numbered
      part = jax.tree.map(parallelism.shard_batch, part)
      (loss, states), grad = jax.value_and_grad(mean_loss, has_aux=True)(
        params, states, part, jax.random.fold_in(dropout_rng, i)
      )
      return (states, jax.tree.map(jnp.add, total, grad)), loss

    start = states, jax.tree.map(jnp.zeros_like, params)
    (states, total), losses = jax.lax.scan(add, start, (jnp.arange(num_parts), parts))
    return (jnp.mean(losses), states), jax.tree.map(lambda x: x / num_parts, total)


def get_sde_loss_fn(
  sde: SDE,
  model: nn.Module,
  train: bool,
  reduce_mean: bool = True,
  continuous: bool = True,
  likelihood_weighting: bool = True,
  eps: float = 1e-5,
) -> Objective:
  """Denoising score matching over continuous time (Eq. 7).

  E_t E_{x_t} lambda(t) ||s(x_t, t) - grad log p(x_t | x_0)||^2, where t is uniform in [eps, T] and
  lambda(t) is the variance of p(x_t | x_0), or g(t)^2 with `likelihood_weighting`.

  Args:
    sde: the forward SDE.
    model: the network.
    train: whether dropout is on.
    reduce_mean: whether to average over the entries of an image; otherwise half their sum is taken.
    continuous: whether the network takes continuous time.
    likelihood_weighting: whether to weight by g(t)^2 (Song, Durkan et al. 2021).
    eps: the smallest time.
  """

  def perturb(rng: RandomKey, data: Batch) -> tuple[Examples, RandomKey]:
    time_rng, noise_rng, dropout_rng = _draws(rng)
    t = jax.random.uniform(time_rng, (data.shape[0],), minval=eps, maxval=sde.T)
    z = jax.random.normal(noise_rng, data.shape)
    return {'image': data, 't': t, 'z': z}, dropout_rng

  def losses_of(
    params: PyTree, states: PyTree, examples: Examples, rng: RandomKey
  ) -> tuple[PerExample, PyTree]:
    data, t, z = examples['image'], examples['t'], examples['z']
    mean, std = sde.marginal_prob(data, t)
    x_t = mean + batch_mul(std, z)
    score_fn = mutils.get_score_fn(sde, model, params, states, train, continuous, return_state=True)
    score, new_states = score_fn(x_t, t, rng=rng)
    if likelihood_weighting:
      g2 = sde.sde(jnp.zeros_like(data), t)[1] ** 2
      return _reduce((score + batch_mul(1 / std, z)) ** 2, reduce_mean) * g2, new_states
    return _reduce((batch_mul(std, score) + z) ** 2, reduce_mean), new_states

  return Objective(perturb, losses_of)


def get_discrete_loss_fn(
  sde: SDE, model: nn.Module, train: bool, *, reduce_mean: bool = False
) -> Objective:
  """The objective of the discrete chain that `sde.perturb_discrete` defines.

  It is E_i weight_i ||network(x_i, i) - target_i||^2 with i uniform in 0...N-1.

  Args:
    sde: the forward SDE.
    model: the network.
    train: whether dropout is on.
    reduce_mean: whether to average over the entries of an image; otherwise half their sum is taken.

  Raises:
    UserError: when the loss is evaluated, if the SDE has no discrete counterpart.
  """

  def perturb(rng: RandomKey, data: Batch) -> tuple[Examples, RandomKey]:
    label_rng, noise_rng, dropout_rng = _draws(rng)
    labels = jax.random.randint(label_rng, (data.shape[0],), 0, sde.N)
    z = jax.random.normal(noise_rng, data.shape)
    return {'image': data, 'label': labels, 'z': z}, dropout_rng

  def losses_of(
    params: PyTree, states: PyTree, examples: Examples, rng: RandomKey
  ) -> tuple[PerExample, PyTree]:
    data, labels, z = examples['image'], examples['label'], examples['z']
    x_i, target, weight = sde.perturb_discrete(data, z, labels)
    model_fn = mutils.get_model_fn(model, params, states, train)
    output, new_states = model_fn(x_i, labels, rng=rng)
    return _reduce((output - target) ** 2, reduce_mean) * weight, new_states

  return Objective(perturb, losses_of)


def get_smld_loss_fn(
  vesde: VESDE, model: nn.Module, train: bool, reduce_mean: bool = False
) -> Objective:
  """The SMLD objective (Eq. 1): the network predicts the score at each of N noise levels.

  The arguments are those of `get_discrete_loss_fn`.
  """
  return get_discrete_loss_fn(vesde, model, train, reduce_mean=reduce_mean)


def get_ddpm_loss_fn(
  vpsde: VPSDE, model: nn.Module, train: bool, reduce_mean: bool = True
) -> Objective:
  """The DDPM objective (Eq. 3): the network predicts the noise at each of N steps.

  The arguments are those of `get_discrete_loss_fn`, but `reduce_mean` is on by default.
  """
  return get_discrete_loss_fn(vpsde, model, train, reduce_mean=reduce_mean)


def get_step_fn(
  sde: SDE,
  model: nn.Module,
  train: bool,
  optimize_fn: Callable[[State, PyTree], State] | None = None,
  reduce_mean: bool = False,
  continuous: bool = True,
  likelihood_weighting: bool = False,
  *,
  grad_accum_steps: int = 1,
  observe: Observer | None = None,
  skip_nonfinite: bool = False,
) -> StepFn:
  """One training or evaluation step, `step_fn((rng, state), batch) -> ((rng, state), loss)`.

  It is a pure function of one global batch: jit it with the batch sharded. Evaluation uses the
  EMA parameters and leaves the state unchanged.

  Args:
    sde: the forward SDE.
    model: the network.
    train: whether the step trains or evaluates.
    optimize_fn: the return value of `optimization_manager`; required to train.
    reduce_mean: whether to average over the entries of an image; otherwise half their sum is taken.
    continuous: whether to take the objective over continuous time (Eq. 7); otherwise the discrete
      one of the SDE is taken (Eq. 1 or 3).
    likelihood_weighting: whether to weight by g(t)^2; only with `continuous`.
    grad_accum_steps: in how many parts, one after the other, the gradient of a batch is computed.
    observe: `(state, gradient) -> other numbers of the step`. With it a training step returns a
      dictionary of them and of the loss, `training_loss`, in place of the loss.
    skip_nonfinite: whether a step whose loss or gradient norm is NaN or infinite only counts, and
      changes nothing else.

  Raises:
    UserError: if a discrete objective is to have likelihood weighting; when the step is run, if the
      SDE has no discrete objective.
  """
  if continuous:
    loss_fn = get_sde_loss_fn(
      sde, model, train, reduce_mean, likelihood_weighting=likelihood_weighting
    )
  elif likelihood_weighting:
    raise UserError(
      'training.likelihood_weighting=True needs training.continuous=True, because discrete '
      'objectives have weights of their own: change one of the two settings.'
    )
  else:
    loss_fn = get_discrete_loss_fn(sde, model, train, reduce_mean=reduce_mean)

  def step_fn(carry: Carry, batch: Examples) -> tuple[Carry, Scalar | Numbers]:
    rng, state = carry
    rng, step_rng = jax.random.split(rng)
    if not train:
      loss, _ = loss_fn(step_rng, state.params_ema, state.model_state, batch)
      return (rng, state), loss
    (loss, model_state), grad = loss_fn.value_and_grad(
      step_rng, state.params, state.model_state, batch, grad_accum_steps
    )
    numbers = {'training_loss': loss, **observe(state, grad)} if observe else loss
    new_state = optimize_fn(state.replace(model_state=model_state), grad)
    if skip_nonfinite:
      new_state = skip_unless(is_finite(loss, grad), new_state, state)
    return (rng, new_state), numbers

  return step_fn


def build_step_fn(
  config: ConfigDict,
  sde: SDE,
  model: nn.Module,
  *,
  train: bool,
  observe: Observer | None = None,
) -> StepFn:
  """The step of `get_step_fn` with the settings of `config.training` and `config.optim`.

  The other arguments are those of `get_step_fn`.

  Raises:
    UserError: if the settings contradict each other, or the optimizer is unknown.
  """
  training = config.training
  return get_step_fn(
    sde,
    model,
    train,
    optimize_fn=optimization_manager(config) if train else None,
    reduce_mean=training.reduce_mean,
    continuous=training.continuous,
    likelihood_weighting=training.likelihood_weighting,
    grad_accum_steps=training.grad_accum_steps,
    observe=observe,
    skip_nonfinite=training.on_nonfinite == 'skip',
  )
