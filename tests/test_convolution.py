"""Convolutions and resampling against XLA's own and against their definitions."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import convolution
from models import up_or_down_sampling as resampling

CASES = [  # batch, height, width, in, out, kernel, dilation
  (4, 8, 8, 6, 10, 3, 1),
  (6, 7, 9, 1, 5, 3, 1),
  (5, 8, 8, 4, 1, 3, 2),
  (3, 6, 6, 8, 16, 1, 1),
  (2, 9, 9, 3, 4, 5, 1),
]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_convolution_and_its_gradients_equal_those_of_xla(case, monkeypatch):
  batch, height, width, channels, features, size, dilation = case
  monkeypatch.setattr(convolution, '_PATCH_BYTES', 2 * height * width * size**2 * channels * 4)
  keys = jax.random.split(jax.random.PRNGKey(0), 3)
  x = jax.random.normal(keys[0], (batch, height, width, channels))
  kernel = jax.random.normal(keys[1], (size, size, channels, features))
  probe = jax.random.normal(keys[2], (batch, height, width, features))

  def run(conv):
    def objective(x, kernel):
      y = conv(
        x,
        kernel,
        (1, 1),
        'SAME',
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )
      return jnp.sum(y * probe), y

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(x, kernel)

  (_, y), grads = run(convolution.conv_general_dilated)
  (_, y_xla), grads_xla = run(jax.lax.conv_general_dilated)
  for actual, expected in zip((y, *grads), (y_xla, *grads_xla), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_convolution_and_its_gradients_are_the_same_on_two_devices():
  test = f'{__file__}::{test_convolution_and_its_gradients_equal_those_of_xla.__name__}'
  flags = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  command = [sys.executable, '-m', 'pytest', '-q', test]
  result = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
  assert f'{len(CASES)} passed' in result.stdout, result.stdout


def _upfirdn_by_definition(x, taps, up, down, pad):
  stuffed = np.zeros(len(x) * up)
  stuffed[::up] = x
  padded = np.pad(stuffed, pad)
  return np.convolve(padded, taps, mode='valid')[::down]


@pytest.mark.parametrize(
  ('up', 'down', 'pad'),
  [(2, 1, (2, 1)), (1, 2, (1, 1)), (1, 1, (2, 1)), (2, 1, (1, 2)), (1, 2, (2, 2)), (3, 1, (3, 1))],
)
def test_resampling_follows_its_definition_along_each_axis(up, down, pad):
  rng = np.random.RandomState(0)
  taps = np.asarray([1.0, 3.0, 2.0, 0.5])  # not symmetric, so that a flip shows
  x = rng.standard_normal((2, 6, 8, 3)).astype(np.float32)
  expected = x
  for axis in (1, 2):
    expected = np.apply_along_axis(
      _upfirdn_by_definition, axis, expected, taps / taps.sum(), up, down, pad
    )
  actual = resampling.upfirdn_2d(jnp.asarray(x), taps, up=up, down=down, pad=pad)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_resampling_by_two_keeps_constants_and_agrees_with_repetition_and_averaging():
  x = jax.random.normal(jax.random.PRNGKey(0), (2, 8, 8, 3))
  np.testing.assert_allclose(
    resampling.naive_upsample_2d(x), x.repeat(2, 1).repeat(2, 2), atol=1e-6
  )
  blocks = x.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
  np.testing.assert_allclose(resampling.naive_downsample_2d(x), blocks, atol=1e-6)
  inside = np.s_[:, 2:-2, 2:-2]
  ones = jnp.ones((1, 16, 16, 1))
  np.testing.assert_allclose(resampling.upsample_2d(ones, (1, 3, 3, 1))[inside], 1, atol=1e-6)
  np.testing.assert_allclose(resampling.downsample_2d(ones, (1, 3, 3, 1))[inside], 1, atol=1e-6)
