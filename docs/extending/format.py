"""A checkpoint format of your own: NumPy's .npz with a signature of four bytes in front.

python main.py --mode=import --config=docs/extending/format.py --checkpoint=weights.mine \
    --workdir=runs/imported
"""

import io
import pathlib

import ml_collections
import numpy as np

import formats
from configs.vp import mnist_ddpmpp_continuous

SIGNATURE = b'MINE'


@formats.register_format(name='a file of mine')
class Mine(formats.Format):
  """Arrays by the names of Flax parameters, such as 'Conv_0/kernel', and the entry `step`."""

  def recognises(self, head):
    """Whether the first 64 bytes of a file are those of this format."""
    return head.startswith(SIGNATURE)

  def read(self, path, config):
    """The arrays; `--mode=import` compares names and shapes with those of the network."""
    with np.load(io.BytesIO(path.read_bytes()[len(SIGNATURE) :]), allow_pickle=False) as file:
      arrays = dict(file)
    step = int(arrays.pop('step'))
    return formats.ImportedCheckpoint(step=step, params=arrays)


def write(path: pathlib.Path, params: dict[str, np.ndarray], *, step: int) -> None:
  """Writes such a file."""
  content = io.BytesIO()
  np.savez(content, step=step, **params)
  path.write_bytes(SIGNATURE + content.getvalue())


def get_config() -> ml_collections.ConfigDict:
  return mnist_ddpmpp_continuous.get_config()
