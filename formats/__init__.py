"""Formats of checkpoint files, each a class that recognises and reads it; register your own."""

from formats.base import (
  FORMATS,
  AdamMoments,
  Contents,
  Format,
  ImportedCheckpoint,
  register_format,
)
from formats.export import Safetensors
from formats.flax_2021 import FlaxCheckpoint
from formats.torch_port import TorchCheckpoint

__all__ = [
  'FORMATS',
  'AdamMoments',
  'Contents',
  'FlaxCheckpoint',
  'Format',
  'ImportedCheckpoint',
  'Safetensors',
  'TorchCheckpoint',
  'register_format',
]
