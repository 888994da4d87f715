"""Checkpoints of the 2021 code: the MessagePack of its training state."""

import pathlib

import numpy as np
from ml_collections import ConfigDict

from formats.base import AdamMoments, Contents, Format, ImportedCheckpoint, register_format
from runtime import weights
from runtime.weights import Arrays


@register_format(name='a Flax checkpoint of the 2021 code')
class FlaxCheckpoint(Format):
  """The MessagePack of the 2021 training state, with flax.optim's Adam."""

  def recognises(self, head: bytes) -> bool:
    # A map of a few entries, the name of the first one. (A length of safetensors has zeros there.)
    return (
      b'\x81' <= head[:1] <= b'\x8f' and b'\xa2' <= head[1:2] <= b'\xbf' and head[2:4].isalpha()
    )

  def read(self, path: pathlib.Path, config: ConfigDict) -> ImportedCheckpoint:
    del config
    content = weights.restore_flax(path.read_bytes())
    file = Contents(path, content, 'give a checkpoint_<number> of the 2021 code')
    averages = file.tree('optimizer', 'state', 'param_states')
    moments = AdamMoments(
      count=file.count('optimizer', 'state', 'step'),
      mu=_with_last(averages, 'grad_ema'),
      nu=_with_last(averages, 'grad_sq_ema'),
    )
    return ImportedCheckpoint(
      step=file.count('step'),
      params=file.tree('optimizer', 'target'),
      params_ema=file.tree('params_ema'),
      moments=moments,
      model_state=file.tree('model_state'),
      settings={'optim.lr': file.number('lr'), 'model.ema_rate': file.number('ema_rate')},
    )


def _with_last(flat: Arrays, leaf: str) -> dict[str, np.ndarray]:
  suffix = f'/{leaf}'
  return {path.removesuffix(suffix): x for path, x in flat.items() if path.endswith(suffix)}
