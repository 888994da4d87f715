"""One's own pictures: a folder, a ZIP file, or what else a `sources.stores.Store` reads."""

import os

from ml_collections import ConfigDict

from runtime.errors import UserError
from sources import cache, splits
from sources.base import Source, register_dataset
from sources.framing import Framing
from sources.pictures import check_background
from sources.stores import PictureFiles, open_store


@register_dataset(name='ImageFolder')
def own_pictures(
  config: ConfigDict,
  split: str,
  *,
  path: str = '',
  crop: str = 'center',
  resize: str = 'bilinear',
  background: str = 'white',
  min_side: int = 0,
  test_list: str = '',
  test_fraction: float = 0.1,
  num_classes: int = 0,
) -> Source:
  """The pictures at `data.path`: a folder, or a ZIP, NPZ, parquet or arrow file.

  The keyword-only parameters are keys of `config.data`; docs/own_pictures.md describes them.

  Raises:
    UserError: if the pictures cannot be read or used.
  """
  framing = Framing(config.data.image_size, crop=crop, resize=resize, min_side=min_side)
  return from_path(
    config.data,
    split,
    path,
    framing=framing,
    background=background,
    test_list=test_list,
    test_fraction=test_fraction,
    num_classes=num_classes,
  )


def from_path(
  data: ConfigDict,
  split: str,
  path: str,
  *,
  framing: Framing,
  background: str = 'white',
  test_list: str = '',
  test_fraction: float = 0.1,
  num_classes: int = 0,
) -> Source:
  """The framed pictures of one split of what is at `path`, from the cache.

  Args:
    data: the configuration, of which `dataset`, `num_channels` and the settings of the cache are
      read.
    split: 'train' or 'test'.
    path: of a folder or file of pictures.
    framing: what is done to each picture.
    background: the colour behind transparent pixels.
    test_list: see `splits.split`.
    test_fraction: see `splits.split`.
    num_classes: how many classes there must be; 0 for any number.

  Raises:
    UserError: if the pictures cannot be read or used.
  """
  check_background(background)
  if not path:
    raise UserError(
      f"data.path='' is empty, but data.dataset={data.dataset!r} needs the folder or file of the "
      f'pictures: set --config.data.path.'
    )
  try:
    store = open_store(os.path.expanduser(path))
    found = store.files()
    skipped = [(file.name, file.fault) for file in found if file.fault]
    used = [file for file in found if not file.fault]
    if not used:
      raise UserError(f'it holds no picture ({cache.summary(skipped)}): put pictures into it.')
    parts = splits.split(used, test_list=test_list, test_fraction=test_fraction)
    if not parts[split]:
      raise UserError(f'no picture is left for the split {split!r}: add some.')
    names, labels = splits.classes(parts)
    names = store.class_names or names
    if num_classes not in (0, len(names)):
      raise UserError(
        f'it has {len(names)} classes, not data.num_classes={num_classes}: set that to '
        f'{len(names)}, or to 0.'
      )
    pictures = PictureFiles(
      store,
      parts[split],
      num_channels=data.num_channels,
      labels=[labels[file] for file in parts[split]],
      background=background,
      class_names=names,
      skipped=skipped,
    )
    return cache.prepared(data, split, pictures, framing)
  except UserError as error:
    message = str(error)
    if message.startswith('data.'):
      raise
    raise UserError(
      f'No images for the split {split!r} of {data.dataset} in data.path={path!r}: {message}'
    ) from error
