"""Executes the notebooks in place, which renews their outputs.

python -m notebooks               all of them
python -m notebooks tutorial      one of them
SCORE_SDE_NOTEBOOK=quick          fewer steps and samples
"""

import pathlib
import sys

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent


def executed(path: pathlib.Path) -> nbformat.NotebookNode:
  """The notebook with the outputs of a new run, which starts in its folder.

  Raises:
    CellExecutionError: if a cell raises an error.
  """
  notebook = nbformat.read(path, as_version=4)
  resources = {'metadata': {'path': str(path.parent)}}
  # Times of execution would differ in every run.
  NotebookClient(notebook, timeout=None, record_timing=False, resources=resources).execute()
  notebook.metadata.pop('language_info', None)  # the Python that executed it
  return notebook


def main(names: list[str]) -> None:
  for path in sorted(FOLDER.glob('*.ipynb')):
    if not names or path.stem in names:
      nbformat.write(executed(path), path)


if __name__ == '__main__':
  main(sys.argv[1:])
