"""What a run leaves for people: logs, metrics, sample grids. Only the first process writes."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from absl import logging
from PIL import Image

from runtime import parallelism
from runtime.errors import UserError

MAX_GRID_PIXELS = 2**24


def write_atomic(path: pathlib.Path, data: bytes) -> None:
  """Writes a file that is complete or absent, whenever the process is killed."""
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}-')
  try:
    with os.fdopen(descriptor, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def check_writable(path: pathlib.Path, setting: str) -> None:
  """Raises `UserError`, naming the `setting`, if no file can be written to the directory `path`."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise UserError(
      f'{setting}: nothing can be written to {path} ({error.strerror}): choose another folder.'
    ) from error


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  write_atomic(path, buffer.getvalue())


def check_finite(values: np.ndarray, what: str, step: int) -> None:
  """Raises `FloatingPointError` for what would else spoil a mean or turn into grey levels."""
  if not np.isfinite(values).all():
    raise FloatingPointError(
      f'{what} of the checkpoint of step {step} are not finite: has its training diverged? Take an '
      f'earlier one, or a method with more steps.'
    )


def to_uint8(images: np.ndarray) -> np.ndarray:
  """From [0, 1] to grey levels by truncation, as the published samples were made.

  What was a grey level before it was scaled is that again: rounding does not take it one below.
  """
  return np.clip(np.asarray(images) * 255.0 + 1e-3, 0, 255).astype(np.uint8)


def grid_capacity(image_shape: tuple[int, ...]) -> int:
  """How many images (H, W, C) a grid shows, so that it stays a file that one can open."""
  height, width = image_shape[:2]
  return max(1, MAX_GRID_PIXELS // (height * width))


def image_grid(images: np.ndarray, columns: int | None = None, padding: int = 2) -> Image.Image:
  """uint8 images (B, H, W, C) row by row in a grid, by default full and nearly square.

  Of more images than `grid_capacity`, the first ones.
  """
  images = images[: grid_capacity(images.shape[1:])]
  count, height, width, channels = images.shape
  root = int(np.ceil(np.sqrt(count)))
  columns = columns or next((n for n in range(root, 2 * root) if count % n == 0), root)
  rows = -(-count // columns)
  cell_h, cell_w = height + padding, width + padding
  grid = np.zeros((rows * cell_h + padding, columns * cell_w + padding, channels), np.uint8)
  for i, image in enumerate(images):
    top, left = i // columns * cell_h + padding, i % columns * cell_w + padding
    grid[top : top + height, left : left + width] = image
  return Image.fromarray(grid[..., 0] if channels == 1 else grid)


def write_samples(directory: pathlib.Path, images: np.ndarray) -> None:
  """Writes `sample.npz` (uint8, key `samples`) and, last, `sample.png`."""
  images = to_uint8(images)
  write_npz(directory / 'sample.npz', samples=images)
  write_png(directory / 'sample.png', image_grid(images))


def write_png(path: pathlib.Path, image: Image.Image) -> None:
  buffer = io.BytesIO()
  image.save(buffer, 'png')
  write_atomic(path, buffer.getvalue())


def write_gif(path: pathlib.Path, frames: list[Image.Image], seconds: float = 4.0) -> None:
  """An animation of `seconds`, which rests on the last frame for two more."""
  buffer = io.BytesIO()
  each = max(20, int(1000 * seconds / len(frames)))  # ms; viewers do not go below 20
  durations = [each] * (len(frames) - 1) + [2000]
  frames[0].save(buffer, 'gif', save_all=True, append_images=frames[1:], duration=durations, loop=0)
  write_atomic(path, buffer.getvalue())


def write_trajectory(directory: pathlib.Path, frames: list[np.ndarray], shown: int = 8) -> None:
  """Writes `trajectory.gif`, all images over time, and `trajectory.png`, a row for each image.

  Args:
    directory: to write to.
    frames: uint8 batches (B, H, W, C), in order of time.
    shown: rows of the still image, and at most 12 columns.
  """
  chosen = np.linspace(0, len(frames) - 1, min(12, len(frames))).round().astype(int)
  strips = np.stack([frames[i][:shown] for i in chosen], axis=1)
  flat = strips.reshape(-1, *strips.shape[2:])
  write_png(directory / 'trajectory.png', image_grid(flat, columns=len(chosen)))
  write_gif(directory / 'trajectory.gif', [image_grid(frame) for frame in frames])


def write_comparison(directory: pathlib.Path, rounds: int, count: int) -> None:
  """Writes `grid.png` of the first `count` images in `samples_<R>.npz`.

  Where something was given, what was given, the sample and the original stand side by side.
  """
  arrays, shown = [], count
  for number in range(rounds):
    if sum(map(len, arrays)) >= shown:
      break
    with np.load(directory / f'samples_{number}.npz') as file:
      keys = [key for key in ('given', 'samples', 'originals') if key in file]
      arrays.append(np.stack([file[key] for key in keys], axis=1))
      shown = min(count, max(1, grid_capacity(arrays[0].shape[2:]) // len(keys)))
  images = np.concatenate(arrays)[:shown]
  flat = images.reshape(-1, *images.shape[2:])
  columns = len(keys) * max(1, int(np.sqrt(shown / len(keys)))) if len(keys) > 1 else None
  write_png(directory / 'grid.png', image_grid(flat, columns))
  if shown < count:
    logging.info('grid.png shows the first %d of %d samples.', shown, count)


class SamplingProgress:
  """Watches a sampler: a bar over its network calls, and the trajectory if that is wanted.

  Args:
    bar: counts network calls.
    nfe: of one run of the sampler, as far as that is known before.
    frame_every: steps between two images that are kept; 0 keeps none.
  """

  def __init__(self, bar: tqdm.tqdm, nfe: int, frame_every: int = 0):
    self._bar, self._nfe, self._every = bar, nfe, frame_every
    self._start = bar.n
    self.frames: list[np.ndarray] = []

  def __call__(self, done: int, total: int, x: Callable[[], jax.Array]) -> None:
    self._bar.update(self._start + self._nfe * done // total - self._bar.n)
    if self._every and (done % self._every == 0 or done == total):
      self.frames.append(to_uint8(parallelism.to_host(x())))


def _step_of(line: str) -> int | None:
  """The step of a line of `metrics.jsonl`; None if it is no such line."""
  try:
    return int(json.loads(line)['step'])
  except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
    return None


class MetricWriter(contextlib.AbstractContextManager):
  """Numbers over training steps: to the log, `metrics.jsonl` and TensorBoard.

  Args:
    workdir: `metrics.jsonl` and `tensorboard/` go here.
    start_step: entries of later steps, left by a run that was killed, are removed.
  """

  def __init__(self, workdir: pathlib.Path, start_step: int = 0):
    self._active = jax.process_index() == 0
    self._path = workdir / 'metrics.jsonl'
    if self._active:
      write_atomic(self._path, ''.join(self._lines_until(start_step)).encode())
      self._file = self._path.open('a', encoding='utf-8')
      self._tensorboard = tensorboardX.SummaryWriter(
        str(workdir / 'tensorboard'), purge_step=start_step + 1 if start_step else None
      )

  def _lines_until(self, step: int) -> list[str]:
    if not self._path.exists():
      return []
    text = self._path.read_text(encoding='utf-8', errors='replace')
    lines = [(line, _step_of(line)) for line in text.split('\n')[:-1]]  # the last may be half one
    if garbage := [line for line, found in lines if found is None]:
      kept = self._path.with_name('metrics-damaged.jsonl')
      shutil.copyfile(self._path, kept)
      logging.warning(
        '%s has %d lines that are no metrics, such as %.40r: they are left out, and kept in %s.',
        self._path,
        len(garbage),
        garbage[0],
        kept,
      )
    return [f'{line}\n' for line, found in lines if found is not None and found <= step]

  def scalar(self, name: str, value: float, step: int) -> None:
    logging.info('step: %d, %s: %.5e', step, name, value)
    if self._active:
      self._file.write(json.dumps({'step': step, name: float(value)}) + '\n')
      self._file.flush()
      self._tensorboard.add_scalar(name, float(value), step)

  def images(self, name: str, images: np.ndarray, step: int) -> None:
    """A grid of images in [0, 1], for TensorBoard."""
    if self._active:
      grid = np.atleast_3d(np.asarray(image_grid(to_uint8(images))))
      self._tensorboard.add_image(name, grid, step, dataformats='HWC')

  def __exit__(self, *exc_info: Any) -> None:
    if self._active:
      self._file.close()
      self._tensorboard.close()


class _AboveProgressBar(io.TextIOBase):
  """The standard error stream, written so that it does not break a progress bar."""

  def write(self, text: str) -> int:
    tqdm.tqdm.write(text, file=sys.stderr, end='')
    return len(text)


def log_to_console() -> None:
  """Shows warnings of all modules and the information of this project's."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.python_handler.stream = _AboveProgressBar()
  logging.set_stderrthreshold('fatal')  # or absl copies what the stream gets to standard error
  _set_up(handler)
  sys.unraisablehook = _quiet_after_failed_write


class _LogFile(logging.logging.FileHandler):
  """A log that a full disk ends with one sentence; the run itself decides whether it can go on."""

  def handleError(self, record: Any) -> None:
    del record
    logging.get_absl_logger().removeHandler(self)
    logging.warning('The log %s ends here: %s.', self.baseFilename, sys.exc_info()[1])


def _quiet_after_failed_write(unraisable: Any) -> None:
  """The event loops of a checkpoint that cannot be written each end with a traceback: no news."""
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def log_to_file(path: pathlib.Path) -> Iterator[None]:
  """Appends the log to `path` as well, until the context ends."""
  if jax.process_index() != 0:
    yield
    return
  handler = _LogFile(path, encoding='utf-8')
  _set_up(handler)
  logger = logging.get_absl_logger()
  logger.addHandler(handler)
  try:
    yield
  finally:
    logger.removeHandler(handler)
    handler.close()


class _Formatter(logging.logging.Formatter):
  """Gives of an exception, which only other packages log, its message."""

  def formatException(self, ei: Any) -> str:
    return ''.join(traceback.format_exception_only(ei[1])).strip()


def _set_up(handler: Any) -> None:
  handler.setFormatter(_Formatter('%(asctime)s %(levelname)s %(message)s'))
  handler.addFilter(_of_this_project)


def _of_this_project(record: Any) -> bool:
  return record.levelno >= logging.logging.WARNING or 'site-packages' not in record.pathname
