"""CelebA, aligned and cropped, https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html."""

import pathlib

from ml_collections import ConfigDict

from runtime.errors import UserError
from sources import cache, published
from sources.base import Pictures, register_dataset
from sources.framing import Framing
from sources.stores import PictureFiles, open_store

_ARCHIVE, _FOLDER, _PARTITIONS = (
  'img_align_celeba.zip',
  'img_align_celeba',
  'list_eval_partition.txt',
)
_NAMES = (_ARCHIVE, _FOLDER, _PARTITIONS)
# Published numbers are of the validation partition, 1, rather than of the test partition, 2.
_NUMBERS = {'train': 0, 'test': 1}


@register_dataset(name='CELEBA')
def celeba(config: ConfigDict, split: str) -> cache.CachedPictures:
  """The central 140 x 140 pixels of CelebA, 162,770 and 19,867 pictures.

  The split 'test' is the validation partition of CelebA, as in published numbers.

  `data.path` is the folder of `list_eval_partition.txt` and of `img_align_celeba.zip` or the folder
  `img_align_celeba` that was extracted from it, or one of them.
  """
  data = config.data
  framing = Framing(data.image_size, crop_side=140)
  return cache.prepared(data, split, _pictures(data, split), framing)


def _pictures(data: ConfigDict, split: str) -> Pictures:
  folder = published.find(data, _FOLDER, _NAMES)
  archive = published.find(data, _ARCHIVE, _NAMES)
  given = pathlib.Path(data.path).name
  if folder and (given == _FOLDER or not archive):
    return _listed(data, split, folder)
  checksums = [published.FILES[name].checksum for name in (_ARCHIVE, _PARTITIONS)]
  return published.LazyPictures(
    f'CelebA {split} {" ".join(checksums)}',
    lambda: _listed(data, split, published.verified(data, _ARCHIVE, _NAMES)),
  )


def _listed(data: ConfigDict, split: str, path: pathlib.Path) -> PictureFiles:
  """The pictures of a split in an archive or folder, in the order of the list of partitions."""
  partitions = _read_partitions(published.verified(data, _PARTITIONS, _NAMES))
  try:
    store = open_store(path)
    files = {file.name: file for file in store.files() if not file.fault}
  except UserError as error:
    raise UserError(f'{path} cannot be read: {error}') from error
  for name in partitions:
    if name not in files:
      raise UserError(
        f'{path} has no picture {name}, which {_PARTITIONS} lists: get both from '
        f'{published.FILES[_ARCHIVE].page} again.'
      )
  for name in files:
    if name not in partitions:
      raise UserError(
        f'{path} has a picture {name}, which {_PARTITIONS} does not list: remove it, or get both '
        f'from {published.FILES[_ARCHIVE].page} again.'
      )
  chosen = [files[name] for name, number in partitions.items() if number == _NUMBERS[split]]
  return PictureFiles(store, chosen, num_channels=data.num_channels)


def _read_partitions(path: pathlib.Path) -> dict[str, int]:
  """The number of the partition of each picture, from lines such as '000001.jpg 0'."""
  partitions = {}
  for i, line in enumerate(path.read_text(encoding='utf-8', errors='replace').splitlines()):
    name, _, number = line.strip().partition(' ')
    if number not in ('0', '1', '2'):
      raise UserError(
        f"Line {i + 1} of {path} is {line[:80]!r}, not a name and 0, 1 or 2 as in '000001.jpg 0': "
        f'get the file from {published.FILES[_PARTITIONS].page} again.'
      )
    partitions[name] = int(number)
  return partitions
