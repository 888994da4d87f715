"""Predictors, correctors and whole samplers: recorded values and exact Gaussians."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import datasets
import losses
import sampling
import sde_lib
from errors import UserError
from models import utils
from sde_lib import VESDE, VPSDE, subVPSDE
from tests import golden_values as golden
from tests.test_sdes import RECORDED, recorded_score


def _recorded_updates(name):
  prefix = f'{name}/'
  keys = [key.removeprefix(prefix) for key in golden.load('updates') if key.startswith(prefix)]
  return sorted({key.rsplit('/', 1)[0] for key in keys})


@pytest.mark.parametrize('name', RECORDED)
def test_single_updates_agree_with_recorded_values(name, recorded_random_bits):
  recorded = golden.load('updates')
  x, t = jnp.asarray(recorded['x']), jnp.asarray(recorded['t'])
  rng = jax.random.PRNGKey(7)
  for key in _recorded_updates(name):
    update, *flow = key.split('/')
    if flow:
      predictor = sampling.get_predictor(update)
      solver = predictor(RECORDED[name], recorded_score, flow == ['1'])
    else:
      solver = sampling.get_corrector(update)(RECORDED[name], recorded_score, 0.16, 3)
    x_new, x_mean = solver.update_fn(rng, x, t)
    golden.assert_close(x_new, recorded[f'{name}/{key}/x'], 2e-5)
    golden.assert_close(x_mean, recorded[f'{name}/{key}/mean'], 2e-5)


@pytest.mark.parametrize(
  'name', ['ve_ncsnpp_continuous', 'vp_ddpmpp_continuous', 'subvp_ddpmpp_continuous']
)
def test_pc_samplers_agree_with_recorded_samples(name, recorded_random_bits):
  recorded = golden.load('samplers')
  settings = json.loads(str(recorded[f'{name}/config']))
  config = golden.config_of(golden.load(f'net_{name}'))
  config.model.num_scales = settings['N']
  sde = sde_lib.get_sde(config)
  model = utils.create_model(config)
  expected = recorded[f'{name}/pc_denoise0']
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.PRNGKey(0), jnp.zeros(expected.shape), jnp.ones(2), train=False)
  )
  params = golden.filled_like(shapes['params'])
  state = losses.State(0, params, params, None, {})
  for denoise in (False, True):
    sampler = sampling.get_pc_sampler(
      sde,
      model,
      expected.shape,
      sampling.get_predictor(settings['predictor']),
      sampling.get_corrector(settings['corrector']),
      inverse_scaler=datasets.get_data_inverse_scaler(config),
      snr=settings['snr'],
      n_steps=settings['n_steps'],
      continuous=True,
      denoise=denoise,
      eps=settings['eps'],
    )
    x, nfe = sampler(jax.random.PRNGKey(31), state)
    golden.assert_close(x, recorded[f'{name}/pc_denoise{int(denoise)}'], 1e-3)
    assert nfe == recorded[f'{name}/nfe']
