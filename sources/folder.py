"""Folders of picture files as data sets."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from ml_collections import ConfigDict

from runtime.errors import UserError
from sources import pictures
from sources.base import Example, register_dataset
from sources.pixels import central_crop, resize


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """Picture files, decoded when they are read, cropped to their central square and resized.

  Attributes:
    files: the pictures, as `pictures.open_folder` lists them.
    size: height and width that they are resized to.
    num_channels: 1 or 3.
  """

  files: Sequence[pictures.File]
  size: int
  num_channels: int

  def __len__(self) -> int:
    """The number of pictures."""
    return len(self.files)

  def __getitem__(self, i: SupportsIndex) -> Example:
    """Example number `i`: 'image', uint8 (size, size, num_channels), and 'label', which is 0.

    Raises:
      UserError: if the picture cannot be read.
    """
    image = pictures.decode(self.files[i].path, self.num_channels)
    return {'image': resize(central_crop(image), self.size), 'label': np.int32(0)}

  @property
  def paths(self) -> list[pathlib.Path]:
    """The paths of the pictures, in the order of the examples."""
    return [pathlib.Path(file.path) for file in self.files]

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the files' sizes and of their names relative to the folder."""
    return pictures.fingerprint(self.files)


@register_dataset(name='CelebAHQ')
@register_dataset(name='FFHQ')
@register_dataset(name='ImageFolder')
def image_folder(config: ConfigDict, split: str, *, path: str = '') -> ImageFolder:
  """The pictures below `config.data.path`, in the order and splits of `pictures.open_folder`.

  Raises:
    UserError: if this is not a folder of pictures, or if its splits are ambiguous.
  """
  try:
    files = pictures.open_folder(os.path.expanduser(path))[split]
  except UserError as error:
    raise UserError(
      f'No images for the split {split!r} of {config.data.dataset} in config.data.path={path!r}: '
      f'{error}'
    ) from error
  return ImageFolder(files, config.data.image_size, config.data.num_channels)
