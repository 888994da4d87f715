"""The notebooks: what is committed is whole, and every cell runs."""

import re

import nbformat
import pytest

from notebooks.__main__ import FOLDER, executed

PATHS = sorted(FOLDER.glob('*.ipynb'))
each_notebook = pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def printed(notebook):
  """All text that the cells have shown."""
  texts = []
  for output in (output for cell in code_cells(notebook) for output in cell.outputs):
    texts += [output.get('text', ''), *map(str, output.get('data', {}).values())]
  return '\n'.join(texts)


def test_both_notebooks_are_here():
  assert [path.stem for path in PATHS] == ['pretrained', 'tutorial']


@each_notebook
def test_a_committed_notebook_has_the_outputs_of_one_run(path):
  notebook = nbformat.read(path, as_version=4)
  cells = code_cells(notebook)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell.outputs]
  assert {output.output_type for output in outputs} == {'display_data'}  # no warning, no error
  assert sum('image/png' in output.data for output in outputs) >= 7
  assert path.stat().st_size < 1_500_000
  assert not re.findall(r'/(?:root|home|tmp|work|Users)/', printed(notebook))


@each_notebook
def test_text_states_no_measured_number(path):
  # A number that a run may change stands in an output, where it cannot differ from the run.
  notebook = nbformat.read(path, as_version=4)
  texts = [cell.source for cell in notebook.cells if cell.cell_type == 'markdown']
  for text in texts:
    assert not re.findall(r'\d(?:\.\d+)? ?(?:%|bits/dim|nats|seconds|NFE)', text), text


@pytest.mark.slow
@each_notebook
def test_every_cell_runs(path, monkeypatch):
  monkeypatch.setenv('SCORE_SDE_NOTEBOOK', 'quick')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  notebook = executed(path)
  tables = printed(notebook)
  assert '|' in tables
  assert not re.findall(r'\bnan\b', tables)
