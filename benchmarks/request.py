"""What `python -m benchmarks` asks the process that measures one configuration."""

import dataclasses
from typing import Any

PARTS = ('train', 'forward', 'sampler', 'likelihood')


@dataclasses.dataclass(frozen=True)
class Request:
  """One measurement; all fields can be written as JSON.

  Attributes:
    config: the configuration file, or file:argument.
    parts: some of `PARTS`.
    runs: how often each part is timed.
    overrides: values by 'section.key'.
    cold: whether to compile all programs again.
    profile: the folder for a trace of the training step; '' writes none.
  """

  config: str
  parts: tuple[str, ...] = PARTS
  runs: int = 7
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  cold: bool = False
  profile: str = ''
