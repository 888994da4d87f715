"""Writes files as torch.save does, without PyTorch."""

import io
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest


class Pickler(pickle.Pickler):
  """Writes NumPy arrays as torch.save writes tensors, their elements to `storages`."""

  def __init__(self, file, storages):
    super().__init__(file, protocol=2)
    self.storages = storages

  def reducer_override(self, x):
    if not isinstance(x, np.ndarray):
      return NotImplemented
    key = str(len(self.storages))
    self.storages[key] = np.ascontiguousarray(x)
    strides = tuple(s // x.itemsize for s in self.storages[key].strides)
    arguments = (Storage(key, x.size), 0, x.shape, strides, False, {})
    return sys.modules['torch._utils']._rebuild_tensor_v2, arguments

  def persistent_id(self, x):
    if isinstance(x, Storage):
      return ('storage', sys.modules['torch'].FloatStorage, x.key, 'cpu', x.size)
    return None


class Storage:
  """What stands for the elements of a tensor in the pickle."""

  def __init__(self, key, size):
    self.key, self.size = key, size


def write_pth(path, content):
  """A file of torch.save, without PyTorch: the pickle needs functions of its names."""
  storages = {}
  buffer = io.BytesIO()
  torch, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')
  utils._rebuild_tensor_v2 = types.FunctionType((lambda: None).__code__, {}, '_rebuild_tensor_v2')
  utils._rebuild_tensor_v2.__module__ = 'torch._utils'
  utils._rebuild_tensor_v2.__qualname__ = '_rebuild_tensor_v2'
  torch.FloatStorage = type('FloatStorage', (), {'__module__': 'torch'})
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, 'torch', torch)
    patch.setitem(sys.modules, 'torch._utils', utils)
    Pickler(buffer, storages).dump(content)
  return write_zip(path, buffer.getvalue(), storages)


def write_zip(path, program, storages):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', program)
    for key, x in storages.items():
      archive.writestr(f'archive/data/{key}', x.tobytes())
  return str(path)


def tensor_program(offset, size, stride, count=6):
  """A pickle of one tensor that views a storage of `count` numbers, in opcodes."""
  numbers = lambda values: (
    b'(' + b''.join(b'J' + v.to_bytes(4, 'little', signed=True) for v in values) + b't'
  )
  reference = (
    b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu'
  )
  reference += b'J' + count.to_bytes(4, 'little') + b'tQ'
  view = b'J' + offset.to_bytes(4, 'little', signed=True) + numbers(size) + numbers(stride)
  return b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(' + reference + view + b'\x89}tR.'
