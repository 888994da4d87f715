"""Framing: crops, filters, and what is too small."""

import numpy as np
import pytest

from runtime.errors import UserError
from sources.base import BadPicture
from sources.framing import Framing


def test_picture_that_is_too_small_is_refused():
  with pytest.raises(BadPicture, match='smaller than 32 pixels'):
    Framing(32)(np.zeros((3, 4, 3), np.uint8))
  assert Framing(32, min_side=3)(np.zeros((3, 4, 3), np.uint8)).shape == (32, 32, 3)
  with pytest.raises(BadPicture, match='smaller than 140 pixels'):
    Framing(64, crop_side=140)(np.zeros((139, 178, 3), np.uint8))


def stripes(height, width):
  """Columns that show their number."""
  return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3))


def test_crops_take_the_part_that_they_name():
  image = np.ascontiguousarray(stripes(40, 80))
  assert Framing(40)(image)[0, :, 0].tolist() == list(range(20, 60))
  assert Framing(40, crop='random')(image).shape == (40, 80, 3)
  squeezed = Framing(40, crop='none')(image)[0, 2:-2, 0]
  np.testing.assert_allclose(squeezed, np.arange(2, 38) * 2 + 0.5, atol=0.6)
  assert Framing(20, crop_side=20)(image)[0, :, 0].tolist() == list(range(30, 50))


@pytest.mark.parametrize('method', ['bilinear', 'bicubic', 'lanczos', 'box'])
def test_every_filter_is_antialiased(method):
  """Stripes finer than the new pixels become their mean."""
  fine = np.zeros((64, 64, 1), np.uint8)
  fine[:, ::2] = 200
  small = Framing(8, resize=method)(fine)[2:-2, 2:-2]
  np.testing.assert_allclose(small, 100, atol=2)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('crop', 'middle', "data.crop='middle' is unknown: choose one of center, none, random"),
    ('resize', 'area', "data.resize='area' is unknown: choose one of bilinear"),
    ('min_side', -1, 'data.min_side=-1 must not be negative'),
  ],
)
def test_framing_that_cannot_be_is_refused(field, value, message):
  with pytest.raises(UserError, match=message):
    Framing(32, **{field: value})
