"""The files of `--mode=export`: the EMA weights in safetensors."""

import json
import pathlib
import re

import safetensors
from ml_collections import ConfigDict

from formats.base import Content, Contents, Format, ImportedCheckpoint, register_format
from runtime import configuration
from runtime import workdir as workdirs
from runtime.errors import UserError
from runtime.weights import enumerate_names


@register_format(name='an export in safetensors')
class Safetensors(Format):
  """A file of `export_checkpoint`, which has the EMA weights only."""

  def recognises(self, head: bytes) -> bool:
    """Whether the file begins with a length and a JSON header, as safetensors do."""
    # The length has eight bytes, the upper four of which are zero: a header is at most 100 MB.
    return head[4:9] == b'\0\0\0\0{'

  def read(self, path: pathlib.Path, config: ConfigDict) -> ImportedCheckpoint:
    """Reads an export, whose weights are both the parameters and their moving averages.

    Raises:
      UserError: if the file has no tensors `params/...` or no step, so is not of `--mode=export`.
    """
    prefix = 'params/'
    with safetensors.safe_open(path, framework='numpy') as opened:
      metadata, names = opened.metadata() or {}, opened.keys()
      step = metadata.get('step', '')
      ours = [name for name in names if name.startswith(prefix)]
      if not ours or not re.fullmatch('[0-9]{1,10}', step):
        raise UserError(
          f'{path} is not of --mode=export, whose tensors are named params/... and whose metadata '
          f'has the step: it has {len(names)} tensors ({enumerate_names(names)}) and the metadata '
          f'({enumerate_names(metadata)}); give a file of --mode=export.'
        )
      arrays = {name: opened.get_tensor(name) for name in names}
    params = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    model_state = {name: x for name, x in arrays.items() if not name.startswith(prefix)}
    recorded = Contents(path, _json(metadata.get('config', '{}')), 'give a file of --mode=export')
    known = configuration.flatten(config).keys()
    settings = {
      name: value
      for name, value in recorded.at(dict).items()
      if workdirs.of_model(name) and name in known
    }
    return ImportedCheckpoint(int(step), params, params, model_state=model_state, settings=settings)


def read_config(path: pathlib.Path) -> dict[str, Content] | None:
  """The configuration in the metadata of an export, by dotted name; None if it is no export.

  Raises:
    UserError: if the file cannot be read.
  """
  try:
    with path.open('rb') as file:
      if not Safetensors().recognises(file.read(16)):
        return None
    with safetensors.safe_open(path, framework='numpy') as opened:
      recorded = _json((opened.metadata() or {}).get('config', ''))
  except (OSError, safetensors.SafetensorError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{path} cannot be read ({reason}): give a file of --mode=export.') from error
  return recorded if isinstance(recorded, dict) else None


def _json(text: str) -> Content:
  """The value of a text in JSON, or the text itself if it is not JSON."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return text
