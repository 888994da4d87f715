"""Pictures of one's own: a folder, or a ZIP, NumPy, Parquet or Arrow file."""

from ml_collections import ConfigDict

from runtime.errors import UserError
from sources import pictures, splits, stores
from sources.base import register_dataset
from sources.cache import CachedPictures, prepared
from sources.framing import Framing


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
) -> CachedPictures:
  """The pictures in `data.path`, cropped and resized to `data.image_size`.

  Args:
    config: the configuration.
    split: 'train' or 'test'; `sources.splits` says which pictures are in which.
    path: a folder of pictures, a .zip or .npz file, a .parquet or .arrow file or a folder of those.
    crop: see `Framing`.
    resize: see `Framing`.
    background: the colour behind transparent pixels, a name or '#rrggbb'.
    min_side: see `Framing`.
    test_list: a text file of the names of the test pictures.
    test_fraction: share of the pictures for testing, where neither a list nor folders decide.
    num_classes: how many classes there must be; 0 takes those that are found.

  Raises:
    UserError: if there is no picture, or a setting does not fit the pictures.
  """
  return from_path(
    config.data,
    split,
    path,
    framing=Framing(config.data.image_size, crop=crop, resize=resize, min_side=min_side),
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
) -> CachedPictures:
  """The framed pictures of one split of what is at `path`; see `own_pictures`."""
  pictures.check_background(background)
  try:
    if not path:
      raise UserError('it is empty: give a folder or file of pictures.')
    store = stores.open_store(path)
    files = store.files()
    chosen = splits.split(files, test_list=test_list, test_fraction=test_fraction)
    labels, class_names = splits.classes(chosen, store.class_names)
    if num_classes not in (0, len(class_names)):
      raise UserError(
        f'data.num_classes={num_classes}, but it has {len(class_names)} classes: set '
        f'data.num_classes=0, or correct the folders or labels.'
      )
    found = stores.PictureFiles(
      store,
      chosen[split],
      labels=labels[split],
      num_channels=data.num_channels,
      background=background,
      class_names=class_names,
      skipped=[(file.name, file.fault) for file in files if file.fault],
    )
  except UserError as error:
    raise UserError(
      f'No images for the split {split!r} of {data.dataset} in data.path={path!r}: {error}'
    ) from error
  return prepared(data, split, found, framing)
