"""The FID Inception network against values recorded from a published port of it."""

import functools

import jax
import numpy as np
import pytest

from models import inception
from tests.golden_values import assert_close, load
from tests.inception_weights import params, state_dict


@pytest.mark.parametrize('images', ['32', pytest.param('wide', marks=pytest.mark.slow)])
def test_features_and_logits_are_the_recorded_ones(images):
  recorded = load('inception')
  forward = jax.jit(functools.partial(inception.forward, scaling='ttur'))
  outputs = forward(params(), recorded[f'images_{images}'])
  for ours, theirs in {
    '64': '64',
    '192': '192',
    '768': '768',
    'pool_3': '2048',
    'logits': 'logits',
    'logits_unbiased': 'logits_unbiased',
  }.items():
    assert_close(outputs[ours], recorded[f'{theirs}_{images}'], 1e-3)


def test_resizing_is_that_of_tensorflow_1():
  """Output pixel i lies at i / scale: exact where it hits a pixel, and linear between two."""
  ramp = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1) * np.ones((1, 1, 4, 1), np.float32)
  resized = np.asarray(inception.resize(ramp, 8))[0, :, 0, 0]
  np.testing.assert_allclose(resized, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3], atol=1e-6)


def test_the_two_scalings_differ_by_half_a_grey_level():
  grey = np.arange(256.0)
  paper, ttur = (inception.SCALINGS[name](grey) for name in ('tfgan', 'ttur'))
  np.testing.assert_allclose([paper[0], paper[255]], [-1, 1])
  np.testing.assert_allclose([ttur[0], ttur[128]], [-1, 0])


def test_a_state_dict_of_another_network_is_refused():
  wrong = state_dict() | {'Mixed_7c.branch1x1.conv.weight': np.zeros((320, 2048, 3, 3))}
  with pytest.raises(ValueError, match='Mixed_7c/branch1x1/conv/kernel'):
    inception.params_from_torch(wrong)
