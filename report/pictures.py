"""Pictures inside a page: as large, as many and as good as a number of bytes allows."""

import base64
import dataclasses
import io
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

# What reading a damaged, hostile or vanished picture raises.
UNREADABLE = (
  OSError,
  ValueError,
  SyntaxError,
  EOFError,
  UnidentifiedImageError,
  Image.DecompressionBombError,
)

_PIXELATED = 640  # width in pixels up to which a picture is shown enlarged, pixel by pixel


@dataclasses.dataclass(frozen=True)
class Level:
  """How pictures are stored.

  Attributes:
    frames: the most that a series keeps.
    side: the largest width and height, in pixels.
    quality: of WebP, up to 100; 0 is lossless.
  """

  frames: int
  side: int
  quality: int


# From the best to the smallest.
LEVELS = (
  Level(60, 1024, 0),
  Level(60, 1024, 90),
  Level(40, 1024, 80),
  Level(40, 768, 80),
  Level(30, 640, 75),
  Level(20, 512, 70),
  Level(12, 400, 60),
  Level(8, 320, 50),
  Level(4, 240, 40),
  Level(2, 160, 30),
)


@dataclasses.dataclass(frozen=True)
class Frame:
  """A picture on the page.

  Attributes:
    label: what it shows.
    uri: the picture itself, as a data URI.
    width: in pixels.
    height: in pixels.
  """

  label: str
  uri: str
  width: int
  height: int

  @property
  def enlarged(self) -> bool:
    """Whether it is so small that it is shown enlarged."""
    return self.width <= _PIXELATED


@dataclasses.dataclass(frozen=True)
class Series:
  """Pictures of one place of the page, in order.

  Attributes:
    labels: what they show.
    paths: the file of each.
    film: whether the single file is an animation, of which each picture is a frame.
  """

  labels: tuple[str, ...]
  paths: tuple[pathlib.Path, ...]
  film: bool = False

  @classmethod
  def of_film(cls, path: pathlib.Path) -> 'Series':
    """The frames of an animation; of none if it cannot be read."""
    try:
      with Image.open(path) as image:
        count = getattr(image, 'n_frames', 1)
    except UNREADABLE:
      count = 1
    return cls(tuple(f'{i + 1} of {count}' for i in range(count)), (path,) * count, film=True)

  def read(self, most: int) -> Iterator[tuple[str, Image.Image | None]]:
    """An even selection of at most `most`: labels, and pictures or None for the unreadable."""
    chosen = even_selection(len(self.paths), most)
    if self.film:
      yield from self._frames(chosen)
      return
    for i in chosen:
      yield self.labels[i], _open(self.paths[i])

  def _frames(self, chosen: list[int]) -> Iterator[tuple[str, Image.Image | None]]:
    try:
      with Image.open(self.paths[0]) as film:
        for i, frame in enumerate(ImageSequence.Iterator(film)):
          if i in chosen:
            yield self.labels[i], frame.convert('RGB')
    except UNREADABLE:
      yield self.labels[0], None


@dataclasses.dataclass(frozen=True)
class Stored:
  """A series on the page.

  Attributes:
    frames: the pictures that could be read.
    total: how many pictures there are, read or not.
    damaged: the labels of those that could not be read.
    lossless: whether the pixels are those of the files.
  """

  frames: list[Frame]
  total: int
  damaged: list[str]
  lossless: bool


def even_selection(count: int, most: int) -> list[int]:
  """At most `most` of the numbers from 0 to `count` - 1, evenly spaced, with the first and last."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def store(series: list[Series], budget: int) -> list[Stored]:
  """Stores all series at the best level at which they fit into `budget` bytes of text.

  If even the smallest level does not fit, the series from the first one that does not are empty.
  """
  for level in LEVELS:
    stored, size = [], 0
    for one in series:
      stored.append(_store(one, level))
      size += _size(stored[-1])
      if size > budget and level is not LEVELS[-1]:
        break
    else:
      break
  room = budget
  for i, one in enumerate(stored):
    room -= _size(one)
    if room < 0:
      stored[i] = dataclasses.replace(one, frames=[])
  return stored


def _size(stored: Stored) -> int:
  """Bytes on the page, with what is written about each picture."""
  return sum(len(frame.uri) + 250 for frame in stored.frames)


def _store(series: Series, level: Level) -> Stored:
  frames, damaged, exact = [], [], True
  for label, image in series.read(level.frames):
    if image is None:
      damaged.append(label)
      continue
    exact = exact and not level.quality and max(image.size) <= level.side
    frames.append(_encode(label, image, level))
  return Stored(frames, len(series.paths), damaged, exact)


def _open(path: pathlib.Path) -> Image.Image | None:
  try:
    with Image.open(path) as image:
      return image.convert('RGB')
  except UNREADABLE:
    return None


def _encode(label: str, image: Image.Image, level: Level) -> Frame:
  image.thumbnail((level.side, level.side), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  lossless = not level.quality
  image.save(buffer, 'webp', lossless=lossless, quality=level.quality or 75, method=4)
  uri = 'data:image/webp;base64,' + base64.b64encode(buffer.getvalue()).decode()
  return Frame(label, uri, *image.size)
