"""How the files of own pictures are split into training and test pictures, and into classes.

The test split is, in this order: the files that a list names; those of a test folder beside a
folder `train`; or those that a hash of the name chooses, so that adding a picture moves no other.
"""

import hashlib
import pathlib
import unicodedata
from collections.abc import Sequence

from absl import logging

from runtime.errors import UserError
from sources.stores import File

# Names of the folder of test pictures beside `train`, in the order of preference.
TEST_FOLDERS = ('test', 'val', 'valid', 'validation', 'dev')

Splits = dict[str, list[File]]


def split(files: Sequence[File], *, test_list: str = '', test_fraction: float = 0.1) -> Splits:
  """The files of the splits 'train' and 'test', in the order of `files`.

  Args:
    files: those that are used.
    test_list: path of a text file that names the test pictures, one on each line.
    test_fraction: share of the pictures that the hash chooses for testing.

  Raises:
    UserError: if the list names a file that does not exist, the fraction is not between 0 and 1, or
      the folders are ambiguous.
  """
  if not 0 < test_fraction < 1:
    raise UserError(f'data.test_fraction={test_fraction} must be between 0 and 1.')
  if test_list:
    return _by_list(files, test_list)
  folders = _split_folders(files)
  if 'test' in folders:
    return {
      part: [file for file in files if _first_folder(file.name) == folder]
      for part, folder in folders.items()
    }
  return by_hash(files, test_fraction)


def by_hash(files: Sequence[File], test_fraction: float) -> Splits:
  """Puts a file into the test split if the hash of its name is in the lowest part of its range.

  No split is left empty: of two files or more, one is moved if need be; a single one is in both.
  """
  if len(files) == 1:
    logging.warning('The only picture, %s, is used for training and for testing.', files[0].name)
    return {'train': list(files), 'test': list(files)}
  places = {file: _place(file.name) for file in files}
  test = {file for file in files if places[file] < test_fraction}
  if not test:
    test = {min(files, key=places.__getitem__)}
  elif len(test) == len(files):
    test.remove(max(files, key=places.__getitem__))
  return {
    'train': [file for file in files if file not in test],
    'test': [file for file in files if file in test],
  }


def _place(name: str) -> float:
  """A number in [0, 1) that depends on the name alone."""
  # File systems spell the same accent in different ways.
  spelled = unicodedata.normalize('NFC', name).encode(errors='surrogateescape')
  return int.from_bytes(hashlib.sha256(spelled).digest()[:8]) / 2**64


def _by_list(files: Sequence[File], path: str) -> Splits:
  try:
    lines = pathlib.Path(path).expanduser().read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'it is no text in UTF-8'
    raise UserError(
      f'data.test_list={path!r} cannot be read ({reason}): name a text file with the name of one '
      f'test picture on each line.'
    ) from error
  wanted = {line.strip() for line in lines if line.strip() and not line.startswith('#')}
  if unknown := sorted(wanted - {file.name for file in files}):
    raise UserError(
      f'data.test_list={path!r} names {unknown[0]!r}, which is not among the {len(files)} '
      f'pictures: names are relative to data.path, such as {files[0].name!r}.'
    )
  return {
    'train': [file for file in files if file.name not in wanted],
    'test': [file for file in files if file.name in wanted],
  }


def _first_folder(name: str) -> str:
  """The first part of a name; empty if the file is in no folder."""
  return name.rpartition('/')[0].partition('/')[0]


def _split_folders(files: Sequence[File]) -> dict[str, str]:
  """The sub-folders of the splits; {} if there is no folder `train`."""
  folders = {_first_folder(file.name) for file in files}
  train = next((name for name in sorted(folders) if name.lower() == 'train'), None)
  others = folders - {train}
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
    return {}
  if strange := sorted(others - set(tests)):
    names = ', '.join(repr(name) if name else 'the folder itself' for name in strange)
    raise UserError(
      f'it has pictures outside {train!r}, in {names}: move them into {train!r} or out of the '
      f'folder; those for testing go into one of {", ".join(TEST_FOLDERS)}.'
    )
  if len(tests) > 1:
    logging.info('Testing uses the folder %r; not used: %s.', tests[0], ', '.join(tests[1:]))
  return {'train': train, 'test': tests[0]} if tests else {'train': train}


def classes(splits: Splits) -> tuple[list[str], dict[File, int]]:
  """The names of the classes in both splits, and the number of the class of each file.

  A store may know the labels; their names are then those numbers. Else a class is the first folder
  below that of the split, and there are no classes unless every file is in such a folder.
  """
  files = [file for part in splits.values() for file in part]
  known = {file.label for file in files}
  if None not in known:
    return [str(label) for label in range(max(known, default=-1) + 1)], {f: f.label for f in files}
  strip = any(_first_folder(file.name).lower() == 'train' for file in files)
  folders = {
    file: _first_folder(file.name.partition('/')[2] if strip else file.name) for file in files
  }
  if '' in folders.values():
    if any(folders.values()):
      logging.info('There are no classes, since some pictures are in no sub-folder.')
    return [], dict.fromkeys(files, 0)
  names = sorted(set(folders.values()))
  return names, {file: names.index(folder) for file, folder in folders.items()}
