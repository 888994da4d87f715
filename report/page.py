"""The page: what is read of the runs, arranged in sections and rendered as one HTML file."""

import dataclasses
import datetime
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import numpy as np
from ml_collections import ConfigDict

from configs.defaults import get_default_configs
from report import curves, pictures
from report.curves import Chart, Line
from report.pictures import Series, Stored
from report.reading import Evaluation, Run, SampleFolder
from runtime import configuration
from runtime.errors import UserError

LIMIT = 5_000_000  # bytes of a page
_MARGIN = 20_000  # for captions and notes of pictures
_CURVES = 1_200_000  # bytes that all curves may take
_POINT = 34  # bytes of a point and of its share of the running mean, at most
_POINTS = 2000  # of a curve, at most
_ABSENT = '\N{EN DASH}'
_LONGEST = 240  # characters of a setting that are shown

_FIRST = ('training_loss', 'eval_loss')  # the curves that come first
_ABOUT = {
  'training_loss': 'of one batch, at the steps that were logged',
  'eval_loss': 'of one test batch, with the EMA parameters',
  'gradient_norm': 'global norm of the gradient, before clipping',
  'learning_rate': 'of the optimizer, with warm-up',
  'images_per_second': 'in training',
  'loss': 'the training objective over the test split',
  'bpd_test': 'bits per dimension of the test split; lower is better',
  'bpd_train': 'bits per dimension of the training split; lower is better',
}
_METRICS = {
  'fid': ('FID', 'Frechet distance between samples and data; lower is better'),
  'kid': ('KID', 'kernel distance between samples and data; lower is better'),
  'inception_score': ('Inception score', 'higher is better'),
  'precision': ('Precision', 'share of samples that lie among the data; higher is better'),
  'recall': ('Recall', 'share of data that lie among the samples; higher is better'),
}
_EXTRACTORS = {
  'inception': 'the FID Inception network, inputs (x - 127.5) / 127.5',
  'inception_ttur': 'the FID Inception network, inputs (x - 128) / 128',
  'mnist5k': "the repository's classifier of digits",
  'pixels': 'the mean colours of 8 x 8 blocks, which see no detail',
}
_PROTOCOL = re.compile(rf'({"|".join(_METRICS)})_(\w+)_(\d+k?)')


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The configuration that runs are compared with.

  Attributes:
    name: the configuration file.
    config: what its `get_config()` returned.
  """

  name: str
  config: ConfigDict

  def flat(self) -> dict[str, Any]:
    """Its settings by dotted name, defaults included, without those that nothing reads."""
    own = configuration.flatten(self.config.copy_and_resolve_references())
    unread = {*configuration.LEGACY, 'device'}
    defaults = configuration.flatten(get_default_configs())
    return defaults | {name: value for name, value in own.items() if name not in unread}


@dataclasses.dataclass(frozen=True)
class Changes:
  """How the configuration of a run differs from its recipe.

  Attributes:
    recipe: the configuration file; '' if it is not known.
    rows: the name, and the values of the recipe and of the run.
    about: where this is known from.
  """

  recipe: str
  rows: list[tuple[str, list[str]]]
  about: str


@dataclasses.dataclass(frozen=True)
class Flipbook:
  """Pictures with a slider: one track for each run, which show the newest picture at a position.

  Attributes:
    tracks: label, colour, and the frames with their positions.
    stops: the positions and their labels.
    notes: what was left out.
    lossless: whether the pixels are those of the files.
  """

  tracks: list[dict[str, Any]]
  stops: list[dict[str, Any]]
  notes: list[str]


def render(runs: list[Run], recipe: Recipe | None, written: datetime.datetime) -> bytes:
  """Renders the page of one or several runs.

  Args:
    runs: the runs, with different labels.
    recipe: the configuration to compare them with; None takes the recorded overrides.
    written: the time that the page names.

  Raises:
    UserError: if the text alone is larger than `LIMIT`.
  """
  lines = sum(len(run.curves) + sum(len(e.names()) for e in run.evaluations) for run in runs)
  points = min(_POINTS, max(_CURVES // (_POINT * max(lines, 1)), 50))
  content = {
    'runs': runs,
    'colours': [curves.COLOURS[i % len(curves.COLOURS)] for i in range(len(runs))],
    'written': written.strftime('%Y-%m-%d %H:%M'),
    'summaries': [_summary(run) for run in runs],
    'curves': metric_charts(runs, points),
    'evaluations': evaluation_charts(runs, points),
    'differing': _differing(runs),
    'changes': [_changes(run, recipe) for run in runs],
    'settings': _settings(runs),
    'machine': _machine(runs),
    'protocol': protocol,
    'bokeh': curves.javascript(),
  }
  series, place = _all_series(runs)
  bare = _render(content | place([Stored([], len(one.paths), [], True) for one in series]))
  room = max(0, LIMIT - len(bare) - _MARGIN)
  page = _render(content | place(pictures.store(series, room)))
  if len(page) > LIMIT:
    raise UserError(
      f'The report of {len(runs)} runs has {len(page):,} bytes, more than {LIMIT:,}: name fewer '
      f'runs in --workdir.'
    )
  return page


def _render(content: Mapping[str, Any]) -> bytes:
  folder = pathlib.Path(__file__).parent / 'templates'
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(folder),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  # Bokeh reads a model where it first appears, so the order of the keys matters.
  environment.policies['json.dumps_kwargs'] = {'separators': (',', ':')}
  environment.filters |= {'number': _number, 'text': _text}
  return environment.get_template('page.html').render(content).encode(errors='replace')


def _number(value: float) -> str:
  """Five digits, as `0.053124` or `1.2e+06`; whole numbers with commas."""
  return f'{value:,.0f}' if value == round(value) and abs(value) < 1e9 else f'{value:.5g}'


def _text(value: Any) -> str:
  """A setting as it is shown: JSON's words in Python's spelling, and cut if it is long."""
  text = value if isinstance(value, str) and value else repr(value)
  return text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ... ({len(text)} characters)'


def _summary(run: Run) -> dict[str, Any]:
  """The tiles at the top: what one wants to know first."""
  config, tiles = run.config, []
  total = config.get('training.n_iters')
  step = run.last_step
  share = None
  if step is not None and isinstance(total, int) and total > 0:
    share = min(step / total, 1.0)
  for name in _FIRST:
    if name in run.curves:
      curve = run.curves[name]
      tiles.append((name, _number(curve.values[-1]), f'at step {int(curve.steps[-1]):,}'))
  for evaluation in run.evaluations:
    last = evaluation.entries[-1]
    for name in evaluation.names():
      if name.startswith(('fid_', 'bpd_')) and name in last:
        where = f'checkpoint {last["number"]:g}, {evaluation.folder}'
        tiles.append((name, _number(last[name]), where))
  if run.speed:
    tiles.append(('steps per second', f'{run.speed[0]:.3g}', run.speed[1]))
  kind = 'classifier' if config and 'model.name' not in config else config.get('model.name')
  parts = (kind, config.get('training.sde'), config.get('data.dataset'))
  return {
    'kind': [str(part) for part in parts if part],
    'step': step,
    'total': total if isinstance(total, int) else None,
    'share': share,
    'tiles': tiles,
    'written': run.written.strftime('%Y-%m-%d %H:%M:%S') if run.written else None,
  }


def metric_charts(runs: list[Run], points: int) -> list[Chart]:
  """A chart for each number of `metrics.jsonl`, all over the same steps."""
  found = sorted({name for run in runs for name in run.curves})
  names = [name for name in _FIRST if name in found] + [n for n in found if n not in _FIRST]
  lines = {
    name: [
      Line(i, run.label, run.curves[name].steps, run.curves[name].values)
      for i, run in enumerate(runs)
      if name in run.curves
    ]
    for name in names
  }
  if not lines:
    return []
  span = curves.span([line for drawn in lines.values() for line in drawn])
  return [
    curves.build(name, _ABOUT.get(name, ''), drawn, span=span, limit=points)
    for name, drawn in lines.items()
  ]


def protocol(name: str) -> tuple[str, str]:
  """A title for a number of an evaluation, and what its name says about how it was measured."""
  match = _PROTOCOL.fullmatch(name)
  if not match:
    return name, _ABOUT.get(name, '')
  metric, extractor, count = match.groups()
  title, about = _METRICS[metric]
  features = _EXTRACTORS.get(extractor, f'the extractor {extractor}')
  return title, f'{name}: {count} samples, features of {features}; {about}'


def evaluation_charts(runs: list[Run], points: int) -> list[Chart]:
  """A chart for each number that some run has at two checkpoints or more."""
  folders = sorted({e.folder for run in runs for e in run.evaluations})
  lines: dict[str, list[Line]] = {}
  for i, run in enumerate(runs):
    for evaluation in run.evaluations:
      for name in evaluation.names():
        if line := _evaluation_line(i, run, evaluation, name, folders):
          lines.setdefault(name, []).append(line)
  return [
    curves.build(*protocol(name), found, span=curves.span(found), limit=points, markers=True)
    for name, found in lines.items()
    if max(len(line.steps) for line in found) > 1
  ]


def _evaluation_line(
  number: int, run: Run, evaluation: Evaluation, name: str, folders: list[str]
) -> Line | None:
  rows = [row for row in evaluation.entries if name in row and 'step' in row]
  if not rows:
    return None
  steps = np.array([row['step'] for row in rows], 'int64')
  values = np.array([row[name] for row in rows], 'float64')
  label = run.label if len(folders) == 1 else f'{run.label}, {evaluation.folder}'
  return Line(number, label, steps, values, folders.index(evaluation.folder))


def _all_series(runs: list[Run]) -> tuple[list[Series], Callable[[list[Stored]], dict[str, Any]]]:
  """All pictures of the page, and what puts them in their places once they are stored."""
  snapshots = [
    Series(tuple(f'step {s.step:,}' for s in run.snapshots), tuple(s.path for s in run.snapshots))
    for run in runs
  ]
  folders = [(i, folder) for i, run in enumerate(runs) for folder in run.samples]
  folders.sort(key=lambda pair: (pair[1].task, pair[1].method, pair[0], pair[1].step))
  grids = [Series(('grid',), (f.grid,)) if f.grid else Series((), ()) for _, f in folders]
  films = [Series.of_film(f.film) if f.film else Series((), ()) for _, f in folders]

  def place(stored: list[Stored]) -> dict[str, Any]:
    first, second = len(snapshots), len(snapshots) + len(grids)
    return {
      'snapshots': _snapshot_book(runs, stored[:first]),
      'samples': [
        _sample_card(number, runs[number], folder, grid, film)
        for (number, folder), grid, film in zip(
          folders, stored[first:second], stored[second:], strict=True
        )
      ],
    }

  return [*snapshots, *grids, *films], place


def _frames(stored: Stored, positions: list[int]) -> list[dict[str, Any]]:
  return [
    {'at': at, 'label': frame.label, 'uri': frame.uri, 'width': frame.width}
    | {'height': frame.height, 'enlarged': frame.enlarged}
    for at, frame in zip(positions, stored.frames, strict=True)
  ]


def _notes(stored: Stored, what: str) -> list[str]:
  notes = [f'{what}, {label}: the picture cannot be read.' for label in stored.damaged]
  if 0 < len(stored.frames) < stored.total - len(stored.damaged):
    notes.append(f'{what}: {len(stored.frames)} of {stored.total} pictures are shown.')
  elif not stored.frames and stored.total > len(stored.damaged):
    notes.append(f'{what}: there is no room for its pictures; name fewer runs.')
  if stored.frames and not stored.lossless:
    notes.append(f'{what}: the pictures are compressed for this page; the files are exact.')
  return notes


def _snapshot_book(runs: list[Run], stored: list[Stored]) -> Flipbook | None:
  tracks, stops, notes = [], {}, []
  for i, (run, one) in enumerate(zip(runs, stored, strict=True)):
    steps = {f'step {s.step:,}': s.step for s in run.snapshots}
    at = [steps[frame.label] for frame in one.frames]
    tracks.append({'label': run.label, 'run': i, 'frames': _frames(one, at)})
    stops |= dict(zip(at, (frame.label for frame in one.frames), strict=True))
    notes += _notes(one, run.label)
  if not stops:
    return Flipbook([], [], notes) if notes else None
  return Flipbook(tracks, [{'at': at, 'label': stops[at]} for at in sorted(stops)], notes)


def _sample_card(
  number: int, run: Run, folder: SampleFolder, grid: Stored, film: Stored
) -> dict[str, Any]:
  """What the page shows of one folder of samples."""
  frames = _frames(film, list(range(len(film.frames))))
  book = Flipbook(
    [{'label': '', 'run': number, 'frames': frames}],
    [{'at': i, 'label': frame['label']} for i, frame in enumerate(frames)],
    _notes(film, 'film') if film.total else [],
  )
  return {
    'run': run,
    'number': number,
    'folder': folder,
    'grid': _frames(grid, [0])[0] if grid.frames else None,
    'notes': _notes(grid, 'grid.png') if grid.total else [],
    'film': book if frames or book.notes else None,
  }


def _differing(runs: list[Run]) -> list[tuple[str, list[str]]]:
  """The settings in which the runs differ, with the value of each run."""
  known = [run for run in runs if run.config]
  if len(known) < 2:
    return []
  names = sorted({name for run in known for name in run.config})
  return [
    (name, [_of_run(run, name) for run in runs])
    for name in names
    if len({_of_run(run, name) for run in known}) > 1
  ]


def _of_run(run: Run, name: str) -> str:
  return _text(run.config[name]) if name in run.config else _ABSENT


def _settings(runs: list[Run]) -> dict[str, list[tuple[str, list[str]]]]:
  """All settings by section, with the value of each run."""
  sections: dict[str, list[tuple[str, list[str]]]] = {}
  for name in sorted({name for run in runs for name in run.config}):
    section, dot, _ = name.partition('.')
    row = name, [_of_run(run, name) for run in runs]
    sections.setdefault(section if dot else 'general', []).append(row)
  return sections


def _changes(run: Run, recipe: Recipe | None) -> Changes:
  """How a run differs from its recipe, as far as that is known."""
  if recipe is not None:
    theirs, own = recipe.flat(), run.config
    rows = [
      (name, [_text(theirs[name]) if name in theirs else _ABSENT, _of_run(run, name)])
      for name in sorted(theirs.keys() | own.keys())
      if theirs.get(name) != own.get(name)
    ]
    return Changes(recipe.name, rows if own else [], 'compared with --config')
  name, overrides = run.start.get('config'), run.start.get('overrides')
  if not isinstance(name, str) or not isinstance(overrides, dict):
    return Changes('', [], 'not recorded: name the recipe with --config to compare the run with it')
  rows = [
    (key, [_text(pair.get('recipe')), _text(pair.get('run'))])
    for key, pair in sorted(overrides.items())
    if isinstance(pair, dict) and pair.get('recipe') != pair.get('run')
  ]
  return Changes(name, rows, 'as the last start of the training recorded it')


def _machine(runs: list[Run]) -> list[tuple[str, list[str]]]:
  """What the runs ran on, one row for each quantity, with the value of each run."""
  rows = {
    'last start': lambda run: run.start.get('time'),
    'devices': lambda run: run.start.get('devices'),
    'processes': lambda run: run.start.get('processes'),
    'CPU of the host': lambda run: run.start.get('cpu'),
    'CPU cores': lambda run: run.start.get('cores'),
    'memory of the host, GiB': lambda run: run.start.get('memory_gib'),
    'steps per second': lambda run: f'{run.speed[0]:.3g} ({run.speed[1]})' if run.speed else None,
  }
  table = [(name, [read(run) for run in runs]) for name, read in rows.items()]
  packages = dict.fromkeys(name for run in runs for name in run.versions)
  table += [(name, [run.versions.get(name) for run in runs]) for name in packages]
  shown = lambda value: 'not recorded' if value is None else _text(value)
  return [(name, [shown(value) for value in values]) for name, values in table]
