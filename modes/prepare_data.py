"""`--mode=prepare_data`: gets the files of a data set, fills the cache and verifies it."""

import pathlib

from absl import logging
from ml_collections import ConfigDict

import datasets
from sources.base import Source
from sources.published import NotFetched


def prepare_data(config: ConfigDict) -> None:
  """Prepares both splits of `config.data`, and logs what they hold.

  It continues where an earlier call was stopped, and only verifies what is complete.

  Raises:
    UserError: if files are missing that no program can get, or are damaged.
  """
  for split in ('train', 'test'):
    source = _open(config, split)
    if hasattr(source, 'verify'):
      source.verify()
    logging.info('%s, %s: %s.', config.data.dataset, split, _summary(source))


def _open(config: ConfigDict, split: str) -> Source:
  """Opens a split; whatever file it asks for is fetched, but each one only once."""
  fetched = set()
  while True:
    try:
      return datasets.get_source(config, split)
    except NotFetched as error:
      if str(error) in fetched:
        raise
      fetched.add(str(error))
      error.fetch()


def _summary(source: Source) -> str:
  """The number of images and of classes, and where they are in the cache."""
  parts = [f'{len(source):,} images']
  parts.append(f'{getattr(source, "num_skipped", 0):,} skipped')
  parts.append(f'{len(getattr(source, "class_names", ()))} classes')
  if hasattr(source, 'folder'):
    folder = pathlib.Path(source.folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    parts.append(f'{size:,} bytes in {folder}')
  return ', '.join(parts)
