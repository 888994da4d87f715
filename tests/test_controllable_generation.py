"""Conditions: recorded values, Gaussians whose posterior is known, and what must never leak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import controllable_generation as control
import datasets
import sampling
from tests import golden_values as golden


@pytest.mark.parametrize('name', golden.CONTINUOUS)
def test_inpainting_and_colorization_agree_with_recorded_images(name, recorded_random_bits):
  recorded, settings, config, sde, model, state = golden.sampling_setup(name)
  arguments = (
    sde,
    model,
    sampling.get_predictor(settings['predictor']),
    sampling.get_corrector(settings['corrector']),
    datasets.get_data_inverse_scaler(config),
    settings['snr'],
    settings['n_steps'],
  )
  options = {'continuous': True, 'denoise': False, 'eps': settings['eps']}
  data = jnp.asarray(recorded['lik_data'])
  mask = jnp.ones(data.shape).at[:, :, data.shape[2] // 2 :].set(0)
  inpainter = control.get_pc_inpainter(*arguments, **options)
  x = inpainter(jax.random.PRNGKey(31), state, data, mask)
  golden.assert_close(x, recorded['inpaint'], 1e-3)
  colorizer = control.get_pc_colorizer(*arguments, **options)
  x = colorizer(jax.random.PRNGKey(31), state, jnp.asarray(recorded['gray']))
  golden.assert_close(x, recorded['colorize'], 1e-3)
