"""Draws the pictures of docs/control.md and the README with the trained networks of this folder.

  pip install scikit-learn && python assets/make_patches.py runs/pictures
  python -m assets.make_gallery runs/pictures                       # all pictures
  python -m assets.make_gallery runs/pictures deblurring gallery    # some of them

The rows of a picture are, from the top: what is observed, two samples, the original.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import controllable_generation as control
import datasets
import sampling
import score_sde
from runtime.reporting import image_grid, to_uint8, write_png

ASSETS = pathlib.Path(__file__).parent
FAST = {'method': 'dpm_solver++', 'eta': 1.0, 'n_steps': 50}
COLUMNS, SIDE = 10, 32  # images in a row, and their pixels


def enlarged(images: np.ndarray, factor: int = 2) -> Image.Image:
  """A grid of images in [0, 1], (B, H, W, C), each pixel a square of `factor` pixels.

  Digits get a dark border, so that they are as large as the patches.
  """
  border = (SIDE - images.shape[1]) // 2
  images = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
  large = to_uint8(images).repeat(factor, 1).repeat(factor, 2)
  return image_grid(large, COLUMNS, padding=factor)


class Gallery:
  """Draws the picture `<name>.png` by the method `<name>`.

  Args:
    pictures: the folder that `make_patches.py` has made.
  """

  def __init__(self, pictures: str):
    self.pictures = pictures
    self.digits = score_sde.load(ASSETS / 'digits.safetensors')
    stored = np.load(ASSETS / 'mnist5k.npz')
    chosen = [np.flatnonzero(stored['test_labels'] == digit)[3] for digit in range(COLUMNS)]
    self.some_digits = stored['test_images'][chosen] / np.float32(255)

  @functools.cached_property
  def patches(self) -> score_sde.TrainedModel:
    """The network of the patches."""
    return score_sde.load(ASSETS / 'patches.safetensors')

  def some_patches(self) -> np.ndarray:
    """Patches that the network was not trained on, in [0, 1]."""
    config = self.patches.config.copy_and_resolve_references()
    config.data.path = self.pictures
    source = datasets.get_source(config, 'test')
    chosen = np.random.default_rng(5).choice(len(source), COLUMNS, replace=False)
    return np.stack([source[i]['image'] for i in chosen]) / np.float32(255)

  def inpainting(self) -> Image.Image:
    """The right half of digits."""
    grey = self.some_digits.copy()
    grey[:, :, 14:] = 0.25
    return self._by_task(self.some_digits, grey, task='inpaint', mask='right')

  def superresolution(self) -> Image.Image:
    """Digits of 7 x 7 pixels."""
    means = self.some_digits.reshape(-1, 7, 4, 7, 4, 1).mean((2, 4))
    blocks = means.repeat(4, 1).repeat(4, 2)
    return self._by_task(self.some_digits, blocks, task='superres', superres_factor=4)

  def colorization(self) -> Image.Image:
    """The colours of patches, by predictor and corrector."""
    images = self.some_patches()
    grey = np.broadcast_to(images.mean(-1, keepdims=True), images.shape)
    samples = [self.patches.sample(images=images, seed=s, task='colorize')[0] for s in (0, 1)]
    return enlarged(np.concatenate([grey, *samples, images]))

  def frequencies(self) -> Image.Image:
    """Digits of which the lowest frequencies are known."""
    basis = control.constant_first_basis(28)
    to_frequencies = lambda x: jnp.einsum('kh,lw,bhwc->bklc', basis, basis, x)
    to_pixels = lambda u: jnp.einsum('kh,lw,bklc->bhwc', basis, basis, u)
    row, column = np.indices((28, 28))
    known = to_frequencies(self.digits.scaler(self.some_digits))
    mask = jnp.broadcast_to((row + column < 8)[None, :, :, None], known.shape)
    condition = control.Imputation(self.digits.sde, known, mask, to_frequencies, to_pixels)
    given = self.digits.inverse_scaler(to_pixels(jnp.where(mask, known, 0)))
    return self._by_condition(condition, np.asarray(given))

  def deblurring(self) -> Image.Image:
    """Digits that were blurred over 7 x 7 pixels, with noise."""
    kernel = jnp.ones((7, 7, 1, 1)) / 49
    layout = ('NHWC', 'HWIO', 'NHWC')
    blur = lambda x: jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'VALID', dimension_numbers=layout
    )
    clean = blur(self.digits.scaler(self.some_digits))
    y = clean + 0.02 * jax.random.normal(jax.random.key(0), clean.shape)
    condition = control.PosteriorGuidance(
      sde=self.digits.sde, y=y, A=blur, noise_std=0.02, scale=0.1, bounds=(-1.0, 1.0)
    )
    border = ((0, 0), (3, 3), (3, 3), (0, 0))
    given = np.pad(np.asarray(self.digits.inverse_scaler(y)), border)
    return self._by_condition(condition, given)

  def _by_task(self, images: np.ndarray, given: np.ndarray, **settings) -> Image.Image:
    """`given`, samples of the digits' network with two seeds, and the images."""
    samples = [
      self.digits.sample(images=images, seed=seed, **settings, **FAST)[0] for seed in (0, 1)
    ]
    return enlarged(np.concatenate([given, *samples, images]))

  def _by_condition(self, condition: sampling.Condition, given: np.ndarray) -> Image.Image:
    """As `_by_task`, for a condition on the ten digits."""
    trained, config = self.digits, self.digits.config.copy_and_resolve_references()
    config.sampling.update(FAST)
    sample = sampling.get_sampling_fn(
      config, trained.sde, trained.model, given.shape, trained.inverse_scaler
    )
    keys = [jax.random.key(seed) for seed in (0, 1)]
    samples = [np.asarray(sample(k, trained.state, condition=condition)[0]) for k in keys]
    return enlarged(np.concatenate([given, *samples, self.some_digits]))

  def gallery(self) -> Image.Image:
    """Four of the other pictures, for the README."""
    left = ('inpainting', 'frequencies')
    right = ('colorization', 'superresolution')
    columns = [[Image.open(ASSETS / f'{name}.png') for name in names] for names in (left, right)]
    gap = 12
    width = sum(column[0].width for column in columns) + gap
    height = max(sum(picture.height for picture in column) for column in columns) + gap
    sheet = Image.new('RGB', (width, height), 'white')
    x = 0
    for column in columns:
      y = 0
      for picture in column:
        sheet.paste(picture.convert('RGB'), (x, y))
        y += picture.height + gap
      x += column[0].width + gap
    return sheet


NAMES = (
  'inpainting',
  'superresolution',
  'colorization',
  'frequencies',
  'deblurring',
  'gallery',
)


def main(pictures: str, *names: str) -> None:
  drawn = Gallery(pictures)
  for name in names or NAMES:
    path = ASSETS / f'{name}.png'
    write_png(path, getattr(drawn, name)())
    print(f'{path}: {path.stat().st_size / 1024:.0f} KB')


if __name__ == '__main__':
  main(*sys.argv[1:])
