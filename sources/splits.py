"""Which pictures are for training and which for testing, and the classes that folders name."""

import hashlib
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence

from absl import logging

from runtime.errors import UserError
from sources.cache import summary
from sources.stores import SUFFIXES, TEST_FOLDERS, File

MAX_CLASSES = 100_000


def split(
  files: Sequence[File], *, test_list: str = '', test_fraction: float = 0.1
) -> dict[str, list[File]]:
  """The pictures of 'train' and 'test'; those with a fault are in neither.

  A list of the test pictures decides. Without one, if there is a sub-folder `train`, its pictures
  are for training, and those of the first of `TEST_FOLDERS` that holds any are for testing; the
  case of these names is ignored. Otherwise a hash of each name decides, so that adding a picture
  moves no other.

  Args:
    files: all of them.
    test_list: a text file of the names of the test pictures, one a line; blank lines and those that
      begin with # are ignored. Empty: there is none.
    test_fraction: share of the pictures for testing, where a hash decides.

  Raises:
    UserError: if there is no picture, the list or `test_fraction` is unusable, or there are other
      folders of pictures beside `train`.
  """
  if not 0 < test_fraction < 1:
    raise UserError(f'data.test_fraction={test_fraction} must be between 0 and 1, such as 0.1.')
  used = [file for file in files if not file.fault]
  if not used:
    faults = [(file.name, file.fault) for file in files]
    found = summary(faults) if faults else f'no file ends in {", ".join(SUFFIXES)}'
    raise UserError(f'it holds no picture that can be read ({found}); put pictures into it.')
  if test_list:
    return _by_list(files, test_list)
  train = min((name for name in map(_folder, files) if name.lower() == 'train'), default=None)
  test = _test_folder(used, train)
  if test is None:
    in_train = [file for file in used if train is None or _folder(file) == train]
    if not in_train:
      raise UserError(f'its folder {train!r} holds no picture that can be read: put some into it.')
    return _by_hash(in_train, test_fraction)
  return {
    name: [file for file in used if _folder(file) == folder]
    for name, folder in (('train', train), ('test', test))
  }


def _folder(file: File) -> str:
  """The first part of the name; empty if the file is in no sub-folder."""
  return file.name.rpartition('/')[0].partition('/')[0]


def _nfc(name: str) -> str:
  """The name with each accented letter as one character; systems store it in either way."""
  return unicodedata.normalize('NFC', name)


def _by_list(files: Sequence[File], test_list: str) -> dict[str, list[File]]:
  try:
    text = pathlib.Path(test_list).expanduser().read_text(encoding='utf-8')
  except (OSError, UnicodeError) as error:
    raise UserError(
      f'data.test_list={test_list!r} cannot be read ({error}): give a text file of names.'
    ) from error
  lines = [_nfc(line.strip()) for line in text.splitlines()]
  listed = [line for line in lines if line and not line.startswith('#')]
  names = {_nfc(file.name) for file in files}
  if unknown := [name for name in listed if name not in names]:
    raise UserError(
      f'data.test_list={test_list!r} names {unknown[0]!r}, which is not there: give names relative '
      f'to data.path, with forward slashes.'
    )
  chosen, splits = set(listed), {'train': [], 'test': []}
  for file in files:
    if not file.fault:
      splits['test' if _nfc(file.name) in chosen else 'train'].append(file)
  for name, members in splits.items():
    if not members:
      raise UserError(
        f'data.test_list={test_list!r} leaves no picture for the split {name!r}: list some of the '
        f'pictures, but not all.'
      )
  return splits


def _test_folder(files: Sequence[File], train: str | None) -> str | None:
  """The sub-folder of test pictures; None if there is none.

  Raises:
    UserError: if there are pictures that belong to neither split.
  """
  others = {_folder(file) for file in files} - {train}
  tests = sorted(
    (name for name in others if name.lower() in TEST_FOLDERS),
    key=lambda name: (TEST_FOLDERS.index(name.lower()), name),
  )
  if train is None:
    if tests:
      raise UserError(
        f"it has a folder {tests[0]!r} but none named 'train': move the training pictures into a "
        f"folder 'train' beside it, or rename it."
      )
    return None
  strange = sorted(others - set(tests))
  if strange:
    names = ', '.join(repr(name) if name else 'the folder itself' for name in strange)
    raise UserError(
      f'it has pictures outside {train!r}, in {names}: move them into {train!r} or out of the '
      f'folder; those for testing go into one of {", ".join(TEST_FOLDERS)}.'
    )
  if len(tests) > 1:
    logging.info('Testing uses the folder %r; not used: %s.', tests[0], ', '.join(tests[1:]))
  return tests[0] if tests else None


def _by_hash(files: Sequence[File], test_fraction: float) -> dict[str, list[File]]:
  """Each name's hash decides; where that leaves a split empty, one picture moves there."""
  if len(files) == 1:
    logging.warning('The only picture, %s, is used for training and for testing.', files[0].name)
    return {'train': list(files), 'test': list(files)}
  ranks = [_rank(file.name) for file in files]
  _, second, *_ = sorted(ranks)
  limit = min(max(test_fraction, second), max(ranks))  # the lowest tests, and the highest trains
  return {
    'train': [file for file, rank in zip(files, ranks, strict=True) if rank >= limit],
    'test': [file for file, rank in zip(files, ranks, strict=True) if rank < limit],
  }


def _rank(name: str) -> float:
  """SHA-256 of the name, as a number in [0, 1]."""
  digest = hashlib.sha256(_nfc(name).encode(errors='surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def classes(
  splits: Mapping[str, Sequence[File]], class_names: Sequence[str] = ()
) -> tuple[dict[str, list[int]], list[str]]:
  """The labels of the pictures of each split, and the names of the classes.

  Labels that the store gives win. Else the first folder below that of the split is the class, and
  classes are numbered by their names in code-point order over all splits. If a picture is in no
  such folder, or there is one class only, there are no classes, and all labels are 0.

  Args:
    splits: the pictures of each.
    class_names: names of the labels that the store gives, where it knows them.

  Raises:
    UserError: if the store gives labels of some pictures only, or one is too large.
  """
  files = [file for members in splits.values() for file in members]
  if any(file.label is not None for file in files):
    return _given(splits, files, class_names)
  folders = {_folder(file) for file in files}
  in_splits = {folder.lower() for folder in folders} <= {'train', *TEST_FOLDERS}
  depth = 1 if in_splits else 0
  found = {_class(file, depth) for file in files}
  names = sorted(found - {''})
  if '' in found and names:
    logging.info('There are no classes, since some pictures are not in the folder of a class.')
  if '' in found or len(names) < 2:
    return {name: [0] * len(members) for name, members in splits.items()}, []
  numbers = {name: number for number, name in enumerate(names)}
  labels = {
    split: [numbers[_class(file, depth)] for file in members] for split, members in splits.items()
  }
  return labels, names


def _class(file: File, depth: int) -> str:
  """The folder at `depth`, from 0, in the name of a file; empty if there is none."""
  folders = _nfc(file.name).split('/')[:-1]
  return folders[depth] if len(folders) > depth else ''


def _given(
  splits: Mapping[str, Sequence[File]], files: Sequence[File], class_names: Sequence[str]
) -> tuple[dict[str, list[int]], list[str]]:
  if missing := [file.name for file in files if file.label is None]:
    raise UserError(f'it has labels, but none for {missing[0]!r}: label all pictures or none.')
  limit = len(class_names) or MAX_CLASSES
  if wrong := [file.label for file in files if not 0 <= file.label < limit]:
    raise UserError(f'it has a label {wrong[0]}, not from 0 to {limit - 1}: number them from 0.')
  largest = max(file.label for file in files)
  names = list(class_names) or [str(number) for number in range(largest + 1)] * (largest > 0)
  return {name: [file.label for file in members] for name, members in splits.items()}, names
