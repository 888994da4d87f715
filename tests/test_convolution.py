"""Convolutions and resampling against XLA's own and against their definitions."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import convolution
from models import up_or_down_sampling as resampling
from tests.processes import ROOT, environment

pytestmark = pytest.mark.usefixtures('quickly_compiled')

CASES = [  # batch, height, width, in, out, kernel, dilation
  (4, 8, 8, 6, 10, 3, 1),
  (6, 7, 9, 1, 5, 3, 1),
  (5, 8, 8, 4, 1, 3, 2),
  (3, 6, 6, 8, 16, 1, 1),
  (2, 9, 9, 3, 4, 5, 1),
]


def _assert_equal_to_xla(case):
  batch, height, width, channels, features, size, dilation = case
  rng = np.random.RandomState(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  x = normal(batch, height, width, channels)
  kernel = normal(size, size, channels, features)
  probe = normal(batch, height, width, features)

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

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(convolution, '_PATCH_BYTES', 2 * height * width * size**2 * channels * 4)
    (_, y), grads = run(convolution.conv_general_dilated)
  (_, y_xla), grads_xla = run(jax.lax.conv_general_dilated)
  for actual, expected in zip((y, *grads), (y_xla, *grads_xla), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_convolution_and_its_gradients_equal_those_of_xla(case):
  _assert_equal_to_xla(case)


@pytest.mark.slow
def test_convolution_and_its_gradients_are_the_same_on_two_devices():
  code = (
    'import jax\n'
    'from tests import test_convolution as tests\n'
    'for case in tests.CASES:\n'
    '  tests._assert_equal_to_xla(case)\n'
    'print("equal on", jax.device_count())\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, env=environment(2), capture_output=True, text=True
  )
  assert result.stdout == 'equal on 2\n', result.stderr


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
  actual = jax.jit(lambda x: resampling.upfirdn_2d(x, taps, up=up, down=down, pad=pad))(x)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


NAIVE = (resampling.naive_upsample_2d, resampling.naive_downsample_2d)
FILTERED = (resampling.upsample_2d, resampling.downsample_2d)


def test_resampling_by_two_keeps_constants_and_agrees_with_repetition_and_averaging():
  x = np.random.RandomState(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
  up, down = jax.jit(lambda x: [f(x) for f in NAIVE])(x)
  np.testing.assert_allclose(up, x.repeat(2, 1).repeat(2, 2), atol=1e-6)
  blocks = x.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
  np.testing.assert_allclose(down, blocks, atol=1e-6)
  inside = np.s_[:, 2:-2, 2:-2]
  filtered = jax.jit(lambda x: [f(x, (1, 3, 3, 1)) for f in FILTERED])(np.ones((1, 16, 16, 1)))
  for constant in filtered:
    np.testing.assert_allclose(constant[inside], 1, atol=1e-6)
