"""Checkpoints of the 2021 code: the MessagePack of its training state."""

import pathlib

from ml_collections import ConfigDict

from formats.base import (
  AdamMoments,
  Content,
  Contents,
  Format,
  ImportedCheckpoint,
  Leaves,
  register_format,
)
from runtime import weights


@register_format(name='a Flax checkpoint of the 2021 code')
class FlaxCheckpoint(Format):
  """The MessagePack of the 2021 training state, with flax.optim's Adam."""

  def recognises(self, head: bytes) -> bool:
    """Whether the file begins with a small MessagePack map whose first key is a name."""
    # A map of up to 15 entries, a string of 2 to 31 bytes, and its letters, where the length that
    # safetensors begin with has zeros.
    return (
      b'\x81' <= head[:1] <= b'\x8f' and b'\xa2' <= head[1:2] <= b'\xbf' and head[2:4].isalpha()
    )

  def read(self, path: pathlib.Path, config: ConfigDict) -> ImportedCheckpoint:
    """Reads a training state; names and layouts of its arrays are ours.

    Raises:
      UserError: if a part of the state is missing.
    """
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


def _with_last(flat: Leaves, leaf: str) -> dict[str, Content]:
  """The leaves whose path ends in `leaf`, by the path of the parameter above it."""
  suffix = f'/{leaf}'
  return {path.removesuffix(suffix): x for path, x in flat.items() if path.endswith(suffix)}
