"""Draws the picture of the architecture from the imports, and prints figures about the code.

python docs/structure.py            writes docs/architecture.svg
python docs/structure.py --figures  prints the figures, one line of JSON

A room is a folder of modules or a module at the root. It stands one floor above the highest room
that it imports; arrows that follow from others are left out of the picture.
"""

import ast
import json
import pathlib
import re
import statistics
import sys

ROOT = pathlib.Path(__file__).parent.parent
# What may import anything, and the site as `make docs` has built it.
LEFT_OUT = ('tests', 'benchmarks', 'faults', 'docs', 'assets', 'notebooks', 'site')
LONG = 450  # lines of a module

Imports = dict[str, set[str]]


def modules() -> dict[str, pathlib.Path]:
  """The files of the program by the names of their modules."""
  found = {}
  for path in sorted([*ROOT.glob('*.py'), *ROOT.glob('*/**/*.py')]):
    parts = path.relative_to(ROOT).with_suffix('').parts
    if not parts[0].startswith('.') and parts[0] not in LEFT_OUT:
      found['.'.join(parts).removesuffix('.__init__')] = path
  return found


def imports_of(name: str, path: pathlib.Path, known: dict[str, pathlib.Path]) -> set[str]:
  """The modules of the program that one module imports, wherever in its code."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      inner = {f'{node.module}.{alias.name}' for alias in node.names}
      modules_in_it = inner & known.keys()
      found |= modules_in_it
      if len(modules_in_it) < len(inner):
        found.add(node.module)
  return (found & known.keys()) - {name}


def import_graph() -> Imports:
  """Which modules each module imports."""
  known = modules()
  return {name: imports_of(name, path, known) for name, path in known.items()}


def room_graph(graph: Imports) -> Imports:
  """Which rooms each room imports."""
  room = lambda name: name.partition('.')[0]
  rooms: Imports = {room(name): set() for name in graph}
  for name, imported in graph.items():
    rooms[room(name)] |= {room(other) for other in imported} - {room(name)}
  return rooms


def cycle(graph: Imports) -> list[str]:
  """The names along one cycle; [] if there is none."""
  done: set[str] = set()

  def visit(name: str, path: list[str]) -> list[str]:
    if name in path:
      return path[path.index(name) :]
    if name in done:
      return []
    done.add(name)
    return next((c for other in sorted(graph[name]) if (c := visit(other, [*path, name]))), [])

  return next((c for name in sorted(graph) if (c := visit(name, []))), [])


def floors(graph: Imports) -> dict[str, int]:
  """The floor of each room, from 1."""
  found: dict[str, int] = {}

  def floor(name: str) -> int:
    if name not in found:
      found[name] = 1 + max((floor(other) for other in graph[name]), default=0)
    return found[name]

  return {name: floor(name) for name in graph}


def reduced(graph: Imports) -> Imports:
  """The graph without the arrows that follow from two or more others."""

  def reachable(name: str) -> set[str]:
    return set().union(*({other} | reachable(other) for other in graph[name]))

  return {
    name: {o for o in imported if not any(o in reachable(p) for p in imported - {o})}
    for name, imported in graph.items()
  }


def draw(path: pathlib.Path) -> None:
  """Writes the picture."""
  import matplotlib as mpl

  mpl.use('svg')
  mpl.rcParams['svg.hashsalt'] = 'structure'  # the same picture for the same imports
  import matplotlib.pyplot as plt

  graph = room_graph(import_graph())
  level, folders = floors(graph), {name.partition('.')[0] for name in modules() if '.' in name}
  rows = {f: sorted(n for n in graph if level[n] == f) for f in sorted(set(level.values()))}
  width = max(map(len, rows.values()))
  place = {
    name: ((i + 0.5) * width / len(row), f) for f, row in rows.items() for i, name in enumerate(row)
  }
  figure, axes = plt.subplots(figsize=(2.3 * width, 0.95 * len(rows)))
  for name, imported in reduced(graph).items():
    for other in sorted(imported):
      (x0, y0), (x1, y1) = place[name], place[other]
      bend = 0.12 * (x1 - x0 > 0 or -1) if y0 - y1 > 1 else 0
      axes.annotate(
        '',
        (x1, y1 + 0.26),
        (x0, y0 - 0.26),
        arrowprops={
          'arrowstyle': '-|>',
          'color': '0.55',
          'connectionstyle': f'arc3,rad={bend}',
          'shrinkA': 0,
          'shrinkB': 0,
        },
      )
  for name, (x, y) in place.items():
    folder = name in folders
    axes.text(
      x,
      y,
      f'{name}/' if folder else f'{name}.py',
      ha='center',
      va='center',
      fontsize=9,
      family='monospace',
      bbox={
        'boxstyle': 'round,pad=0.45',
        'facecolor': '#dbe9f6' if folder else '#fdf6e3',
        'edgecolor': '0.4',
      },
    )
  axes.set_xlim(0, width)
  axes.set_ylim(0.5, len(rows) + 0.5)
  axes.axis('off')
  figure.savefig(path, bbox_inches='tight', metadata={'Date': None})


def functions(path: pathlib.Path) -> list[ast.FunctionDef]:
  """The functions and methods of a module."""
  tree = ast.parse(path.read_text(encoding='utf-8'))
  return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def public_functions(path: pathlib.Path) -> list[ast.FunctionDef]:
  """Those that others can call: not private, and not inside another function."""
  tree = ast.parse(path.read_text(encoding='utf-8'))
  scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
  found = [node for scope in scopes for node in scope.body if isinstance(node, ast.FunctionDef)]
  return [f for f in found if not f.name.startswith('_')]


def _annotated(function: ast.FunctionDef) -> bool:
  arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
  named = [a for a in arguments if a.arg not in ('self', 'cls')]
  return function.returns is not None and all(a.annotation for a in named)


_ARRAYS = re.compile(
  r'\bjax\.Array\b|\bnp\.ndarray\b|\b(Float|Int|Integer|Real|UInt8|Bool|Shaped)\[|'
  r'\b(Batch|PerExample|Images|GreyLevels|Labels|Logits|Features|Scalar)\b'
)
_SHAPES = re.compile(
  r'\b(Float|Int|Integer|Real|UInt8|Bool|Shaped|Num)\[|'
  r'\b(Batch|PerExample|Images|GreyLevels|Labels|Logits|Features|Scalar|RandomKey)\b'
)


def _annotations(function: ast.FunctionDef) -> str:
  arguments = [*function.args.args, *function.args.kwonlyargs]
  found = [a.annotation for a in arguments if a.annotation] + [function.returns]
  return ' '.join(ast.unparse(node) for node in found if node is not None)


def figures() -> dict[str, float | str]:
  """Lengths, annotations and shapes of the program's functions."""
  paths, rooms = modules().values(), room_graph(import_graph())
  found_cycle = cycle(rooms)
  found = [f for path in paths for f in functions(path)]
  lengths = sorted(f.end_lineno - f.lineno + 1 for f in found)
  public = [f for path in paths for f in public_functions(path)]
  arrays = [f for f in public if _ARRAYS.search(_annotations(f))]
  shapes = [f for f in arrays if _SHAPES.search(_annotations(f))]
  lines = {path: len(path.read_text(encoding='utf-8').splitlines()) for path in paths}
  return {
    'modules': len(lines),
    'rooms': len(rooms),
    'floors': 'none: ' + ' -> '.join(found_cycle) if found_cycle else max(floors(rooms).values()),
    f'modules over {LONG} lines': sum(n > LONG for n in lines.values()),
    'functions': len(lengths),
    'lines of a function, median': statistics.median(lengths),
    'lines of a function, 90th percentile': lengths[int(0.9 * len(lengths))],
    'lines of a function, longest': lengths[-1],
    'public functions annotated': round(sum(map(_annotated, public)) / len(public), 3),
    'public array functions with shapes': round(len(shapes) / max(len(arrays), 1), 3),
  }


if __name__ == '__main__':
  if '--figures' in sys.argv:
    print(json.dumps(figures()))
  else:
    draw(ROOT / 'docs' / 'architecture.svg')
