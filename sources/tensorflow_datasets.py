"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Shaped, UInt8
from ml_collections import ConfigDict

from runtime.errors import UserError
from sources import cache
from sources.base import BadPicture, Example, Source, register_dataset
from sources.framing import Framing

# What features of a prepared data set are classes of, and the keys that name these classes.
_FEATURES = 'tensorflow_datasets.core.features.'
_CLASS_KEYS = ('pythonClassName', 'python_class_name', 'type')

Transform = Callable[[Shaped[np.ndarray, 'H W C']], UInt8[np.ndarray, 'size size C']]


@dataclasses.dataclass(frozen=True)
class TFDSSource:
  """A split of a TensorFlow Datasets builder, read without TensorFlow.

  Attributes:
    source: a `tfds.data_source`, whose items have 'image' and perhaps 'label'.
    transform: from a stored image, (H, W, C), to the one that the network is trained on, uint8
      (size, size, C).
  """

  source: Source
  transform: Transform

  def __len__(self) -> int:
    """The number of examples."""
    return len(self.source)

  def __getitem__(self, i: SupportsIndex) -> Example:
    """Example number `i`: the transformed 'image', and 'label', an int32 that is 0 by default."""
    example = self.source[int(i)]
    return {
      'image': self.transform(np.asarray(example['image'])),
      'label': np.int32(example.get('label', 0)),
    }


def tfds_source(
  name: str,
  split: str,
  transform: Transform,
  *,
  data_dir: str | pathlib.Path | None = None,
) -> TFDSSource:
  """Opens a data set that TensorFlow Datasets has prepared; it never prepares one.

  Args:
    name: of the builder.
    split: 'train', 'test', ...
    transform: see `TFDSSource`.
    data_dir: folder of the data sets; None takes TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises:
    UserError: if the data set has not been prepared.
  """
  return TFDSSource(_open(name, split, data_dir)[1], transform)


def _open(name: str, split: str, data_dir: str | pathlib.Path | None) -> tuple[Any, Any]:
  """The builder of a prepared data set, and the examples of a split."""
  # Imported here, because the import takes seconds and most runs do without it.
  import tensorflow_datasets as tfds

  where = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  _refuse_foreign_classes(pathlib.Path(where).expanduser(), name)
  try:
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    return builder, builder.as_data_source(split)
  except Exception as error:
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    raise UserError(
      f'The split {split!r} of {name!r} is not prepared in {where} ({reason}): run `tfds build '
      f'{name} --file_format=array_record` on a machine with TensorFlow and copy the result to '
      f'this folder, or set data.path to the folder that has it.'
    ) from error


def _refuse_foreign_classes(where: pathlib.Path, builder: str) -> None:
  """TensorFlow Datasets would import whatever module the files of a data set name.

  Raises:
    UserError: if one names a class that is not of TensorFlow Datasets itself.
  """
  plain = lambda name: name.replace('_', '').lower()  # MyPictures is in the folder my_pictures
  parts = [plain(part) for part in re.split('[/:]', builder)]
  folders = [folder for folder in where.glob('*/') if plain(folder.name) in parts]
  # These patterns follow links, as TensorFlow Datasets does.
  depths = ('*/features.json', '*/*/features.json')
  for path in (path for folder in folders for depth in depths for path in folder.glob(depth)):
    try:
      names = list(_class_names(json.loads(path.read_text(encoding='utf-8'))))
    except (OSError, ValueError, RecursionError) as error:
      raise UserError(f'{path} cannot be read ({error}): copy the data set again.') from error
    for name in names:
      if '.' in name and not name.startswith(_FEATURES):
        raise UserError(
          f'{path} names {name!r}, code that TensorFlow Datasets would import; nothing was run: '
          f'use a data set whose features are classes of {_FEATURES[:-1]}.'
        )


def _class_names(content: Any) -> Iterator[str]:
  """The names of classes in decoded JSON, also those in texts that are JSON themselves."""
  if isinstance(content, dict):
    yield from (content[key] for key in _CLASS_KEYS if isinstance(content.get(key), str))
    content = list(content.values())
  if isinstance(content, list):
    for item in content:
      yield from _class_names(item)
  elif isinstance(content, str) and content.lstrip().startswith('{'):
    with contextlib.suppress(ValueError):
      yield from _class_names(json.loads(content))


@register_dataset(name='TFDS')
def prepared_tfds(
  config: ConfigDict,
  split: str,
  *,
  path: str = '',
  builder: str = '',
  tfds_train: str = 'train',
  tfds_test: str = 'test',
  crop: str = 'center',
  resize: str = 'bilinear',
) -> cache.CachedPictures:
  """A data set that somebody has prepared with TensorFlow Datasets, in the format array_record.

  `data.builder` is its name, such as 'cifar10', `data.path` the folder of prepared data sets (else
  TFDS_DATA_DIR or ~/tensorflow_datasets), and `data.tfds_train` and `data.tfds_test` are the names
  of its splits.

  Raises:
    UserError: if `data.builder` is empty, or the data set has not been prepared.
  """
  if not builder:
    raise UserError(
      "data.builder='' is empty, but data.dataset='TFDS' needs one: set it to the name of a data "
      "set that TensorFlow Datasets has prepared, such as 'cifar10'."
    )
  name = tfds_train if split == 'train' else tfds_test
  opened, examples = _open(builder, name, os.path.expanduser(path) or None)
  features = opened.info.features
  pictures = _TFDSPictures(
    examples,
    title=f'{opened.info.full_name}, {name}',
    key=f'{_key(pathlib.Path(opened.data_dir))} {name}',
    class_names=tuple(getattr(features['label'], 'names', ())) if 'label' in features else (),
  )
  framing = Framing(config.data.image_size, crop=crop, resize=resize)
  return cache.prepared(config.data, split, pictures, framing)


def _key(folder: pathlib.Path) -> str:
  """SHA-256 of names, sizes and times of the files of a prepared data set."""
  files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
  about = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
  return hashlib.sha256(json.dumps(about).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _TFDSPictures:
  """Pictures of a prepared data set; see `sources.base.Pictures`.

  Attributes:
    examples: a `tfds.data_source`.
    title: what they are called in messages.
    key: a string that differs wherever the files differ.
    class_names: names of the labels.
    skipped: empty.
  """

  examples: Any
  title: str
  key: str
  class_names: Sequence[str] = ()
  skipped: Sequence[tuple[str, str]] = ()

  def __len__(self) -> int:
    """The number of pictures."""
    return len(self.examples)

  def name(self, i: int) -> str:
    """The data set and the number of the picture."""
    return f'{self.title}, example {i}'

  def read(self, i: int) -> tuple[UInt8[np.ndarray, 'H W C'], int]:
    """Picture number `i` and its label."""
    example = self.examples[i]
    image = np.asarray(example['image'])
    if image.dtype != np.uint8:
      raise BadPicture(f'{image.dtype} in place of uint8')
    return image, int(example.get('label', 0))
