"""Executes the notebooks in place, which renews their outputs.

python -m notebooks               all of them
python -m notebooks tutorial      one of them
SCORE_SDE_NOTEBOOK=quick          fewer steps and samples
"""

import base64
import io
import pathlib
import sys

import nbformat
from nbclient import NotebookClient
from PIL import Image

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
  for cell in notebook.cells:
    for output in cell.get('outputs', []):
      if picture := output.get('data', {}).get('image/png'):
        output['data']['image/png'] = _smaller(picture)
  return notebook


def _smaller(picture: str) -> str:
  """A PNG in base64 with at most 256 colours, which takes a third of the room."""
  file = io.BytesIO()
  image = Image.open(io.BytesIO(base64.b64decode(picture))).convert('RGB')
  image.quantize(256, dither=Image.Dither.NONE).save(file, 'png', optimize=True)
  return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]) -> None:
  for path in sorted(FOLDER.glob('*.ipynb')):
    if not names or path.stem in names:
      nbformat.write(executed(path), path)


if __name__ == '__main__':
  main(sys.argv[1:])
