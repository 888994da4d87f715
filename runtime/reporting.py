"""What a run writes for its users: logs, metrics, sample grids. Only the first process writes."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import RotatingFileHandler
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from absl import logging
from jaxtyping import Float, UInt8
from PIL import Image

from runtime import parallelism, startup
from runtime.array_types import Array, GreyLevels, Images
from runtime.errors import UserError
from runtime.files import write_atomic

# What an .npz file can hold; NumPy makes an array of a single number or text.
Storable = np.ndarray | np.generic | float | int | str
_Floats = Float[Array, '*dims']
_Levels = UInt8[np.ndarray, '*dims']

MAX_GRID_PIXELS = 2**24
# Of stdout.txt, after which it becomes stdout.txt.1; that many old ones are kept.
_LOG_BYTES, _OLD_LOGS = 10_000_000, 3


def check_writable(path: pathlib.Path, setting: str) -> None:
  """Checks that files can be written to the directory `path`, which is created if absent.

  Raises:
    UserError: if they cannot; the message names the `setting` that chose the directory.
  """
  try:
    os.fspath(path).encode()  # which the library that writes checkpoints needs
  except UnicodeEncodeError as error:
    raise UserError(
      f'{setting}: the path {os.fspath(path)!a} is not UTF-8: choose another folder.'
    ) from error
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise UserError(
      f'{setting}: nothing can be written to {path} ({error.strerror}): choose another folder.'
    ) from error


def write_npz(path: pathlib.Path, **arrays: Storable) -> None:
  """Writes a compressed .npz file with these arrays, complete or not at all."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  write_atomic(path, buffer.getvalue())


def check_finite(values: _Floats, what: str, step: int) -> None:
  """Checks numbers computed from the checkpoint of training step `step`.

  Raises:
    FloatingPointError: if any of the values is NaN or infinite: they would spoil a mean, or turn
      into arbitrary grey levels.
  """
  if not np.isfinite(values).all():
    raise FloatingPointError(
      f'{what} of the checkpoint of step {step} are not finite: has its training diverged? Use an '
      f'earlier checkpoint, or a sampler with more steps.'
    )


def to_uint8(images: _Floats) -> _Levels:
  """Images in [0, 1] as grey levels, by truncation, as for the published samples.

  The small number added keeps a grey level that was divided by 255 the same: rounding errors do
  not take it one level down.
  """
  return np.clip(np.asarray(images) * 255.0 + 1e-3, 0, 255).astype(np.uint8)


def grid_capacity(image_shape: tuple[int, ...]) -> int:
  """How many images of shape (H, W, C) a grid may show and still be a file of ordinary size."""
  height, width = image_shape[:2]
  return max(1, MAX_GRID_PIXELS // (height * width))


def image_grid(images: GreyLevels, columns: int | None = None, padding: int = 2) -> Image.Image:
  """Arranges grey levels (B, H, W, C) row by row in a grid.

  Args:
    images: the images; only the first `grid_capacity` of them are shown.
    columns: images in a row; by default the grid is as close to a square as it can be full.
    padding: pixels between images.
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


def write_samples(directory: pathlib.Path, images: Images) -> None:
  """Writes images (B, H, W, C) in [0, 1]: `sample.npz` (uint8), then `sample.png`."""
  images = to_uint8(images)
  write_npz(directory / 'sample.npz', samples=images)
  write_png(directory / 'sample.png', image_grid(images))


def write_png(path: pathlib.Path, image: Image.Image) -> None:
  """Writes a picture as PNG, complete or not at all."""
  buffer = io.BytesIO()
  image.save(buffer, 'png')
  write_atomic(path, buffer.getvalue())


def write_gif(path: pathlib.Path, frames: list[Image.Image], seconds: float = 4.0) -> None:
  """Writes an animation that lasts `seconds` and then shows the last frame for two more."""
  buffer = io.BytesIO()
  each = max(20, int(1000 * seconds / len(frames)))  # ms; viewers do not go below 20
  durations = [each] * (len(frames) - 1) + [2000]
  frames[0].save(buffer, 'gif', save_all=True, append_images=frames[1:], duration=durations, loop=0)
  write_atomic(path, buffer.getvalue())


def write_trajectory(directory: pathlib.Path, frames: list[GreyLevels], shown: int = 8) -> None:
  """Writes `trajectory.gif`, all images over time, and `trajectory.png`, a row for each image.

  Args:
    directory: where the files go.
    frames: batches of grey levels (B, H, W, C), in the order of the sampler's steps.
    shown: how many images, each a row of at most 12 frames, `trajectory.png` has.
  """
  chosen = np.linspace(0, len(frames) - 1, min(12, len(frames))).round().astype(int)
  strips = np.stack([frames[i][:shown] for i in chosen], axis=1)
  flat = strips.reshape(-1, *strips.shape[2:])
  write_png(directory / 'trajectory.png', image_grid(flat, columns=len(chosen)))
  write_gif(directory / 'trajectory.gif', [image_grid(frame) for frame in frames])


def write_comparison(directory: pathlib.Path, rounds: int, count: int) -> None:
  """Writes `grid.png` of the first `count` images in the files `samples_<R>.npz`.

  For tasks that use test images it shows the observed part, the sample and the original side by
  side.

  Args:
    directory: where the files are.
    rounds: the number of files.
    count: the number of samples in all files.
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
  """A callback for samplers: it advances a progress bar and may record the trajectory.

  Args:
    bar: the progress bar, which counts NFE (function evaluations of the network).
    nfe: the NFE of one run of the sampler, or an estimate where the sampler adapts its steps.
    frame_every: steps between two recorded frames; 0 records none.

  Attributes:
    frames: the recorded batches of grey levels (B, H, W, C).
  """

  def __init__(self, bar: tqdm.tqdm, nfe: int, frame_every: int = 0):
    self._bar, self._nfe, self._every = bar, nfe, frame_every
    self._start = bar.n
    self.frames: list[GreyLevels] = []

  def __call__(self, done: int, total: int, x: Callable[[], Images]) -> None:
    """Reports `done` of `total` steps; `x` returns the images x_t (B, H, W, C) in [0, 1]."""
    self._bar.update(self._start + self._nfe * done // total - self._bar.n)
    if self._every and (done % self._every == 0 or done == total):
      self.frames.append(to_uint8(parallelism.to_host(x())))


def _step_of(line: str) -> int | None:
  """The step that a line of `metrics.jsonl` belongs to; None if the line is damaged."""
  try:
    return int(json.loads(line)['step'])
  except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
    return None


class MetricWriter(contextlib.AbstractContextManager):
  """Writes numbers over training steps to the log, `metrics.jsonl` and TensorBoard.

  Args:
    workdir: the directory of `metrics.jsonl` and `tensorboard/`.
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
    lines = [
      (line, _step_of(line)) for line in text.split('\n')[:-1]
    ]  # the last one may be cut off
    if garbage := [line for line, found in lines if found is None]:
      kept = self._path.with_name('metrics-damaged.jsonl')
      shutil.copyfile(self._path, kept)
      logging.warning(
        '%s has %d lines that are not metrics, such as %.40r: they are dropped; %s has a copy.',
        self._path,
        len(garbage),
        garbage[0],
        kept,
      )
    return [f'{line}\n' for line, found in lines if found is not None and found <= step]

  def scalar(self, name: str, value: float, step: int) -> None:
    """Records `value` as the number `name` of training step `step`."""
    logging.info('step: %d, %s: %.5e', step, name, value)
    self.scalars({name: float(value)}, step)

  def scalars(self, values: Mapping[str, float], step: int) -> None:
    """Records several numbers of training step `step`, which the caller may log in its own way."""
    if self._active:
      self._file.write(json.dumps({'step': step, **values}) + '\n')
      self._file.flush()
      for name, value in values.items():
        self._tensorboard.add_scalar(name, value, step)

  def images(self, name: str, images: Images, step: int) -> None:
    """Records a grid of images (B, H, W, C), in [0, 1], in TensorBoard."""
    if self._active:
      grid = np.atleast_3d(np.asarray(image_grid(to_uint8(images))))
      self._tensorboard.add_image(name, grid, step, dataformats='HWC')

  def __exit__(self, *exc_info: Any) -> None:
    if self._active:
      self._file.close()
      self._tensorboard.close()


class _AboveProgressBar(io.TextIOBase):
  """Writes to standard error without breaking a progress bar."""

  def write(self, text: str) -> int:
    tqdm.tqdm.write(text, file=sys.stderr, end='')
    return len(text)


def log_to_console() -> None:
  """Sends the warnings of all packages and the information of this project to standard error."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.python_handler.stream = _AboveProgressBar()
  logging.set_stderrthreshold('fatal')  # else absl writes every line to standard error again
  _set_up(handler)
  sys.unraisablehook = startup.unraisable


class _LogFile(RotatingFileHandler):
  """A log file of bounded size that ends with a sentence if the disk is full; the run does not."""

  def handleError(self, record: Any) -> None:
    del record
    logging.get_absl_logger().removeHandler(self)
    logging.warning('The log %s ends here: %s.', self.baseFilename, sys.exc_info()[1])


@contextlib.contextmanager
def log_to_file(path: pathlib.Path) -> Iterator[None]:
  """Also appends the log to the file `path`, until the context ends."""
  if jax.process_index() != 0:
    yield
    return
  handler = _LogFile(path, maxBytes=_LOG_BYTES, backupCount=_OLD_LOGS, encoding='utf-8')
  _set_up(handler)
  logger = logging.get_absl_logger()
  logger.addHandler(handler)
  try:
    yield
  finally:
    logger.removeHandler(handler)
    handler.close()


class _Formatter(logging.logging.Formatter):
  """Shows the message of an exception in place of its traceback; only other packages log one."""

  def formatException(self, ei: Any) -> str:
    return ''.join(traceback.format_exception_only(ei[1])).strip()


def _set_up(handler: Any) -> None:
  handler.setFormatter(_Formatter('%(asctime)s %(levelname)s %(message)s'))
  handler.addFilter(_of_this_project)


def _of_this_project(record: Any) -> bool:
  if 'orbax' in record.pathname:
    return False  # a save that fails writes dozens of lines; `checkpoints` raises it as a sentence
  return record.levelno >= logging.logging.WARNING or 'site-packages' not in record.pathname
