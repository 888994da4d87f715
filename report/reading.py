"""What the directory of a run holds, read for a page. Nothing here writes or locks.

The run may be in progress, old, or damaged: what cannot be read becomes a note, which the page
shows where the content would be.
"""

import dataclasses
import datetime
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from runtime import configuration
from runtime.errors import UserError

_LOGGED = re.compile(r'(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) INFO step: (\d+), training_loss')
_SNAPSHOT = re.compile(r'iter_(\d+)_host_0')


@dataclasses.dataclass(frozen=True)
class Note:
  """What is missing or damaged.

  Attributes:
    section: of the page: curves, snapshots, samples, evaluation, settings or machine.
    text: a sentence.
    damage: whether something is wrong, not only absent.
  """

  section: str
  text: str
  damage: bool


@dataclasses.dataclass(frozen=True)
class Curve:
  """One number over training steps, in the order of the steps; all values are finite.

  Attributes:
    steps: the steps.
    values: the values.
    left_out: how many values were NaN or infinite.
  """

  steps: Int[np.ndarray, ' n']
  values: Float[np.ndarray, ' n']
  left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A picture that training drew at a step."""

  step: int
  path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class SampleFolder:
  """What one `--mode=sample` has written.

  Attributes:
    name: of the folder.
    facts: what the reports and the settings say, by name, in the order in which they are shown.
    task: the conditioning; '' if not recorded.
    method: the sampler; '' if not recorded.
    step: the training step of the checkpoint; -1 if not recorded.
    grid: `grid.png`; None if it does not exist yet.
    film: `trajectory.gif`, else `trajectory.png`; None without either.
  """

  name: str
  facts: dict[str, str]
  task: str
  method: str
  step: int
  grid: pathlib.Path | None
  film: pathlib.Path | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The numbers of one folder of `--mode=eval`.

  Attributes:
    folder: its name inside the directory of the run.
    entries: for each checkpoint its `number`, `step` and the numbers by name.
    floor: the split-half baseline: numbers of one half of the data against the other.
    facts: the settings that the numbers depend on most, and the reference data.
    warnings: of the evaluation itself.
  """

  folder: str
  entries: list[dict[str, float]]
  floor: dict[str, float]
  facts: dict[str, str]
  warnings: list[str]

  def names(self) -> list[str]:
    """The names of the numbers, in the order in which they first appear."""
    found = dict.fromkeys(name for entry in self.entries for name in entry)
    return [name for name in found if name not in ('number', 'step')]


@dataclasses.dataclass
class Run:
  """The content of the directory of a run.

  Attributes:
    path: the directory.
    label: its short name, different for each run of a page.
    config: the flat configuration; {} if not recorded.
    start: the content of `start.json`; {} if not recorded.
    versions: the versions of the packages; {} if not recorded.
    data: the content of `data.json`; {} if not recorded.
    curves: the numbers of `metrics.jsonl`.
    snapshots: the pictures drawn during training, by step.
    samples: the folders of `--mode=sample`.
    evaluations: the folders of `--mode=eval`.
    speed: training steps per second, and where that is from; None if not recorded.
    written: when `metrics.jsonl` was last written; None without it.
    notes: what is missing or damaged.
  """

  path: pathlib.Path
  label: str
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  start: dict[str, Any] = dataclasses.field(default_factory=dict)
  versions: dict[str, Any] = dataclasses.field(default_factory=dict)
  data: dict[str, Any] = dataclasses.field(default_factory=dict)
  curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
  snapshots: list[Snapshot] = dataclasses.field(default_factory=list)
  samples: list[SampleFolder] = dataclasses.field(default_factory=list)
  evaluations: list[Evaluation] = dataclasses.field(default_factory=list)
  speed: tuple[float, str] | None = None
  written: datetime.datetime | None = None
  notes: list[Note] = dataclasses.field(default_factory=list)

  def note(self, section: str, text: str) -> None:
    """Adds a note of something that is not there."""
    self.notes.append(Note(section, text, damage=False))

  def warn(self, section: str, text: str) -> None:
    """Adds a note of something that is damaged."""
    self.notes.append(Note(section, text, damage=True))

  @property
  def last_step(self) -> int | None:
    """The last step that anything was recorded of."""
    steps = [int(curve.steps[-1]) for curve in self.curves.values()]
    return max([*steps, *(snapshot.step for snapshot in self.snapshots)], default=None)


def read_run(path: pathlib.Path, label: str) -> Run:
  """Reads the directory of a run.

  Raises:
    UserError: if the directory does not exist or holds nothing of a run.
  """
  if not path.is_dir():
    raise UserError(f'--workdir={path} is no directory: name the directory of a run.')
  run = Run(path, label)
  run.config = configuration.flatten(_json(run, 'config.json', 'settings'))
  run.versions = _json(run, 'versions.json', 'machine')
  run.start = _json(run, 'start.json', 'machine', old='runs of earlier versions have none')
  run.data = _json(run, 'data.json', 'settings')
  run.curves = _read_curves(run)
  run.snapshots = _find_snapshots(run)
  run.samples = list(_read_samples(run))
  run.evaluations = list(_read_evaluations(run))
  run.speed = _speed(run)
  if not (run.config or run.curves or run.snapshots or run.samples or run.evaluations):
    raise UserError(
      f'--workdir={path} holds no run: it has neither config.json nor metrics, samples or '
      f'evaluations; name the directory that was the --workdir of a run.'
    )
  return run


def _json(run: Run, name: str, section: str, old: str = '') -> dict[str, Any]:
  """The JSON object of a file; {} and a note if it is missing or damaged."""
  path = run.path / name
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    run.note(section, f'{name} does not exist: not recorded{f" ({old})" if old else ""}.')
    return {}
  except (OSError, ValueError, RecursionError):
    run.warn(section, f'{name} is damaged or cannot be read: it is left out.')
    return {}
  if not isinstance(content, dict):
    run.warn(section, f'{name} holds no JSON object: it is left out.')
    return {}
  return content


def _read_curves(run: Run) -> dict[str, Curve]:
  path = run.path / 'metrics.jsonl'
  try:
    text = path.read_text(encoding='utf-8', errors='replace')
    run.written = datetime.datetime.fromtimestamp(path.stat().st_mtime)
  except FileNotFoundError:
    run.note('curves', 'metrics.jsonl does not exist: nothing has been logged yet.')
    return {}
  except OSError as error:
    run.warn('curves', f'metrics.jsonl cannot be read ({error.strerror}).')
    return {}
  *lines, torn = text.split('\n')
  if torn:
    run.note('curves', 'The last line of metrics.jsonl is not complete: it is left out.')
  points: dict[str, list[tuple[int, float]]] = {}
  damaged = 0
  for line in lines:
    entry = _entry(line)
    damaged += entry is None
    for name, value in (entry or {}).items():
      if name != 'step' and _is_number(value):
        points.setdefault(name, []).append((entry['step'], float(value)))
  if damaged:
    run.warn('curves', f'{damaged} lines of metrics.jsonl are no metrics: they are left out.')
  curves = {name: _curve(pairs) for name, pairs in points.items()}
  for name, curve in curves.items():
    if curve.left_out:
      run.warn('curves', f'{name}: {curve.left_out} values are not finite and left out.')
  return {name: curve for name, curve in curves.items() if len(curve.steps)}


def _entry(line: str) -> dict[str, Any] | None:
  try:
    entry = json.loads(line)
  except (ValueError, RecursionError):
    return None
  whole = isinstance(entry, dict) and type(entry.get('step')) is int
  return entry if whole and abs(entry['step']) < 2**53 else None


def _is_number(value: Any) -> bool:
  """Whether this is a number of JSON that a float can hold, which may be NaN or infinite."""
  small = not isinstance(value, int) or value.bit_length() < 1000
  return isinstance(value, (int, float)) and not isinstance(value, bool) and small


def _curve(pairs: list[tuple[int, float]]) -> Curve:
  steps, values = np.array([p[0] for p in pairs], np.int64), np.array([p[1] for p in pairs])
  order = np.argsort(steps, kind='stable')
  finite = order[np.isfinite(values[order])]
  return Curve(steps[finite], values[finite], len(pairs) - len(finite))


def _find_snapshots(run: Run) -> list[Snapshot]:
  folders = {
    int(match[1]): path
    for path in _folders(run.path / 'samples')
    if (match := _SNAPSHOT.fullmatch(path.name))
  }
  found = [Snapshot(step, folders[step] / 'sample.png') for step in sorted(folders)]
  if without := [snapshot.step for snapshot in found if not snapshot.path.is_file()]:
    run.warn('snapshots', f'No sample.png at step {", ".join(map(str, without))}.')
  found = [snapshot for snapshot in found if snapshot.path.is_file()]
  if not found:
    off = run.config.get('training.snapshot_sampling') is False
    why = 'training.snapshot_sampling is off.' if off else 'They come with the kept checkpoints.'
    run.note('snapshots', f'No samples have been drawn during training. {why}')
  return found


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
  try:
    return sorted(child for child in path.iterdir() if child.is_dir())
  except OSError:
    return []


def _read_samples(run: Run) -> Iterator[SampleFolder]:
  for path in _folders(run.path / 'samples'):
    files = sorted(path.glob('report_*.json'))
    if _SNAPSHOT.fullmatch(path.name) or not (files or (path / 'settings.json').exists()):
      continue
    name = path.name
    reports = [_json(run, f'samples/{name}/{file.name}', 'samples') for file in files]
    reports = [report for report in reports if report]
    settings = _json(run, f'samples/{name}/settings.json', 'samples')
    first = reports[0] if reports else {}
    films = [path / f'trajectory.{kind}' for kind in ('gif', 'png')]
    grid = path / 'grid.png'
    if not grid.is_file():
      run.note('samples', f'{name} has no grid.png yet: {len(reports)} rounds are done.')
    yield SampleFolder(
      name=name,
      facts=_sample_facts(reports, settings),
      task=str(first.get('task', settings.get('sampling.task', ''))),
      method=str(first.get('method', settings.get('sampling.method', ''))),
      step=first['step'] if type(first.get('step')) is int else -1,
      grid=grid if grid.is_file() else None,
      film=next((film for film in films if film.is_file()), None),
    )


def _sample_facts(reports: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, str]:
  """What the caption of a grid says."""
  first = reports[0] if reports else {}
  facts = {name: first.get(key) for name, key in (('step', 'step'), ('seed', 'seed'))}
  nfe = [report['nfe'] for report in reports if _is_number(report.get('nfe'))]
  if nfe:
    facts['NFE'] = f'{min(nfe):g}' + (f' to {max(nfe):g}' if min(nfe) != max(nfe) else '')
  count = sum(r['samples'] for r in reports if _is_number(r.get('samples')))
  facts['samples'] = f'{count:g}' if count else None
  seconds = [report['seconds'] for report in reports if _is_number(report.get('seconds'))]
  if seconds and len(seconds) == len(reports):
    facts['seconds'] = f'{sum(seconds):.4g}'
  shown = ('eta', 'churn', 'time_grid', 'predictor', 'corrector', 'snr', 'mask', 'guidance_scale')
  facts |= {key: settings.get(f'sampling.{key}') for key in shown}
  return {key: str(value) for key, value in facts.items() if value is not None}


def _read_evaluations(run: Run) -> Iterator[Evaluation]:
  found = sorted({*run.path.glob('*/meta.json'), *run.path.glob('*/*/meta.json')})
  for path in found:
    folder = path.parent.relative_to(run.path).as_posix()
    meta = _json(run, f'{folder}/meta.json', 'evaluation')
    if not isinstance(meta.get('settings'), dict):
      continue
    if not path.with_name('report.json').exists():
      run.note('evaluation', f'{folder} has no report.json yet.')
      continue
    report = _json(run, f'{folder}/report.json', 'evaluation')
    rows = {int(n): row for n, row in report.items() if n.isdecimal() and isinstance(row, dict)}
    if not rows:
      continue
    last = rows[max(rows)]
    warnings = [w for row in rows.values() for w in _items(row.get('warnings'))]
    warnings += [w for row in rows.values() for w in _items(row.get('bpd_warnings'))]
    yield Evaluation(
      folder=folder,
      entries=[{'number': n, **_finite(rows[n])} for n in sorted(rows)],
      floor=_finite(last['floor']) if isinstance(last.get('floor'), dict) else {},
      facts=_evaluation_facts(meta['settings'], last),
      warnings=list(dict.fromkeys(map(str, warnings))),
    )
  if not found:
    run.note('evaluation', 'No evaluation has been made: see --mode=eval.')


def _items(value: Any) -> list[Any]:
  return value if isinstance(value, list) else []


def _finite(row: Mapping[str, Any]) -> dict[str, float]:
  return {key: v for key, v in row.items() if _is_number(v) and math.isfinite(v)}


def _evaluation_facts(settings: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, str]:
  """What the numbers of a folder are about, as its `meta.json` and its last entry record it."""
  recorded: dict[str, Any] = {'reference data': last.get('reference')}
  names = {
    'sampling': ('sampling.method', 'sampling.n_steps', 'sampling.eta', 'eval.num_samples'),
    'bpd': ('eval.bpd_dataset', 'eval.bpd_repeats', 'likelihood.eps', 'likelihood.rtol'),
    'loss': ('training.likelihood_weighting',),
  }
  for task, keys in names.items():
    own = settings.get(task)
    if isinstance(own, dict):
      recorded |= {key: own.get(key) for key in keys}
  return {key: str(value) for key, value in recorded.items() if value is not None}


def _speed(run: Run) -> tuple[float, str] | None:
  """Training steps per second: the median over the run."""
  batch, curve = run.config.get('training.batch_size'), run.curves.get('images_per_second')
  if curve is not None and _is_number(batch) and batch > 0:
    return float(np.median(curve.values)) / batch, 'median of images_per_second / batch size'
  try:
    text = (run.path / 'stdout.txt').read_text(encoding='utf-8', errors='replace')
  except OSError:
    return None
  logged = [
    (datetime.datetime.fromisoformat(f'{time}.{milliseconds}'), int(step))
    for time, milliseconds, step in _LOGGED.findall(text)
  ]
  rates = [
    (step - before) / seconds
    for (then, before), (now, step) in itertools.pairwise(logged)
    if step > before and (seconds := (now - then).total_seconds()) > 0
  ]
  if len(rates) < 3:
    return None
  return float(np.median(rates)), 'median between two lines of stdout.txt'


def short_labels(paths: list[pathlib.Path]) -> list[str]:
  """The last parts of the paths, as many as tell them apart."""
  if len({path.resolve() for path in paths}) < len(paths):
    raise UserError('--workdir names the same directory twice: name each run once.')
  absolute = [path.absolute() for path in paths]
  for count in range(1, max(len(path.parts) for path in absolute) + 1):
    labels = ['/'.join(path.parts[-count:]) for path in absolute]
    if len(set(labels)) == len(labels):
      break
  return labels


def read_runs(paths: list[pathlib.Path]) -> list[Run]:
  """Reads several runs, which get labels that tell them apart; see `read_run`."""
  return [read_run(path, label) for path, label in zip(paths, short_labels(paths), strict=True)]
