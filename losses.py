"""Training objectives, and one training or evaluation step.

Every loss function has the form `loss_fn(rng, params, states, batch) -> (loss, new states)`, where
`batch` is {'image': (B, H, W, C)} in the range that the network expects; evaluation adds
{'weight': (B,)}, zero for examples that do not count.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from models import utils as mutils
from runtime.errors import UserError
from sde_lib import SDE, VESDE, VPSDE, batch_mul
from train_state import State, get_optimizer, optimization_manager, register_optimizer

__all__ = [
  'LossFn',
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
LossFn = Callable[[jax.Array, PyTree, PyTree, dict[str, jax.Array]], tuple[jax.Array, PyTree]]
Carry = tuple[jax.Array, State]
StepFn = Callable[[Carry, dict[str, jax.Array]], tuple[Carry, jax.Array]]


def _reduce(squares: jax.Array, reduce_mean: bool) -> jax.Array:
  """Per example, (B,): the mean over pixels, or half their sum."""
  squares = squares.reshape(squares.shape[0], -1)
  return jnp.mean(squares, axis=-1) if reduce_mean else 0.5 * jnp.sum(squares, axis=-1)


def _batch_mean(losses: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
  """The mean over examples; `weight` of the batch, if it is there, leaves some out."""
  return jnp.average(losses, weights=batch.get('weight'))


def _draws(rng: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Keys for the time, the noise and the dropout."""
  rng, time_rng = jax.random.split(rng)
  rng, noise_rng = jax.random.split(rng)
  _, dropout_rng = jax.random.split(rng)
  return time_rng, noise_rng, dropout_rng


def get_sde_loss_fn(
  sde: SDE,
  model: nn.Module,
  train: bool,
  reduce_mean: bool = True,
  continuous: bool = True,
  likelihood_weighting: bool = True,
  eps: float = 1e-5,
) -> LossFn:
  """Denoising score matching over continuous time (Eq. 7).

  E_t E_{x_t} lambda(t) ||s(x_t, t) - grad log p(x_t | x_0)||^2, where t is uniform in [eps, T] and
  lambda is the variance of the marginal, or g(t)^2 with `likelihood_weighting`.

  Args:
    sde: the forward SDE.
    model: the network.
    train: whether dropout is on.
    reduce_mean: average over pixels; else half the sum.
    continuous: whether the network takes continuous time.
    likelihood_weighting: weigh by g(t)^2 (Song et al. 2021, "Maximum likelihood training").
    eps: smallest time.
  """

  def loss_fn(rng, params, states, batch):
    data = batch['image']
    time_rng, noise_rng, dropout_rng = _draws(rng)
    t = jax.random.uniform(time_rng, (data.shape[0],), minval=eps, maxval=sde.T)
    z = jax.random.normal(noise_rng, data.shape)
    mean, std = sde.marginal_prob(data, t)
    x_t = mean + batch_mul(std, z)

    score_fn = mutils.get_score_fn(sde, model, params, states, train, continuous, return_state=True)
    score, new_states = score_fn(x_t, t, rng=dropout_rng)
    if likelihood_weighting:
      g2 = sde.sde(jnp.zeros_like(data), t)[1] ** 2
      losses = _reduce((score + batch_mul(1 / std, z)) ** 2, reduce_mean) * g2
    else:
      losses = _reduce((batch_mul(std, score) + z) ** 2, reduce_mean)
    return _batch_mean(losses, batch), new_states

  return loss_fn


def get_discrete_loss_fn(
  sde: SDE, model: nn.Module, train: bool, reduce_mean: bool = False
) -> LossFn:
  """The objective of the discrete chain that `sde.perturb_discrete` defines."""

  def loss_fn(rng, params, states, batch):
    data = batch['image']
    label_rng, noise_rng, dropout_rng = _draws(rng)
    labels = jax.random.randint(label_rng, (data.shape[0],), 0, sde.N)
    z = jax.random.normal(noise_rng, data.shape)
    x_i, target, weight = sde.perturb_discrete(data, z, labels)
    model_fn = mutils.get_model_fn(model, params, states, train)
    output, new_states = model_fn(x_i, labels, rng=dropout_rng)
    losses = _reduce((output - target) ** 2, reduce_mean) * weight
    return _batch_mean(losses, batch), new_states

  return loss_fn


def get_smld_loss_fn(
  vesde: VESDE, model: nn.Module, train: bool, reduce_mean: bool = False
) -> LossFn:
  """The SMLD objective (Eq. 1): the network predicts the score at each of N noise levels."""
  return get_discrete_loss_fn(vesde, model, train, reduce_mean)


def get_ddpm_loss_fn(
  vpsde: VPSDE, model: nn.Module, train: bool, reduce_mean: bool = True
) -> LossFn:
  """The DDPM objective (Eq. 3): the network predicts the noise at each of N steps."""
  return get_discrete_loss_fn(vpsde, model, train, reduce_mean)


def get_step_fn(
  sde: SDE,
  model: nn.Module,
  train: bool,
  optimize_fn: Callable[[State, PyTree], State] | None = None,
  reduce_mean: bool = False,
  continuous: bool = True,
  likelihood_weighting: bool = False,
) -> StepFn:
  """One training or evaluation step, `step_fn((rng, state), batch) -> ((rng, state), loss)`.

  It is a pure function of one global batch: jit it with the batch sharded. Evaluation uses the
  EMA parameters and leaves the state as it is.

  Args:
    sde: the forward SDE.
    model: the network.
    train: train or evaluate.
    optimize_fn: what `optimization_manager` returns; needed to train.
    reduce_mean: average the loss over pixels; else half the sum.
    continuous: the objective over continuous time; else the SDE's discrete one.
    likelihood_weighting: weigh by g(t)^2; continuous only.

  Raises:
    UserError: likelihood weighting of a discrete objective, or an SDE that has none.
  """
  if continuous:
    loss_fn = get_sde_loss_fn(
      sde, model, train, reduce_mean, likelihood_weighting=likelihood_weighting
    )
  elif likelihood_weighting:
    raise UserError(
      'training.likelihood_weighting=True needs training.continuous=True: '
      'the discrete objectives have weights of their own.'
    )
  else:
    loss_fn = get_discrete_loss_fn(sde, model, train, reduce_mean)

  def step_fn(carry, batch):
    rng, state = carry
    rng, step_rng = jax.random.split(rng)
    if not train:
      loss, _ = loss_fn(step_rng, state.params_ema, state.model_state, batch)
      return (rng, state), loss
    grad_fn = jax.value_and_grad(loss_fn, argnums=1, has_aux=True)
    (loss, model_state), grad = grad_fn(step_rng, state.params, state.model_state, batch)
    state = optimize_fn(state.replace(model_state=model_state), grad)
    return (rng, state), loss

  return step_fn


def build_step_fn(config: ConfigDict, sde: SDE, model: nn.Module, train: bool) -> StepFn:
  """`get_step_fn` as `config.training` and `config.optim` ask."""
  training = config.training
  return get_step_fn(
    sde,
    model,
    train,
    optimize_fn=optimization_manager(config) if train else None,
    reduce_mean=training.reduce_mean,
    continuous=training.continuous,
    likelihood_weighting=training.likelihood_weighting,
  )
