"""Small files that ask for much: each ends in a sentence, within a second and in little memory."""

import json
import pathlib
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import jax
import msgpack
import numpy as np
import pytest
import safetensors.numpy

from models import classifier, utils
from modes import convert as conversion
from runtime import torch_file
from runtime.errors import UserError
from tests import tiny_config
from tests.processes import ROOT
from tests.tiny_config import TinyClassifier
from tests.torch_files import tensor_program, write_zip

# Programs of pickles, which are bytes: b'.' ends one with the last value that was made.
START = b'\x80\x02'


def put(place):
  return b'r' + struct.pack('<I', place)


def get(place):
  return b'j' + struct.pack('<I', place)


def doubling(first, twice, levels=60):
  """A value that has the one before twice, and so on: 2^levels of the first one."""
  program = first + put(0)
  for level in range(levels):
    program += twice(get(level)) + put(level + 1)
  return program


def name(module, attribute):
  return f'c{module}\n{attribute}\n'.encode()


def number(n):
  return b'\x8a\x0c' + n.to_bytes(12, 'little')


NESTED = 'nested in each other'
TENSOR = tensor_program(0, (1000,), (1,), 1000)[2:-1]

PROGRAMS = {
  'a key whose hash takes forever': (
    doubling(b')', lambda x: x + x + b'\x86') + b'}' + get(60) + b'Ns.',
    'neither a name nor a small number',
  ),
  'a list of lists': (doubling(b']', lambda x: b'](' + x + x + b'e') + b'.', NESTED),
  'a dictionary of dictionaries': (
    doubling(b'}', lambda x: b'}(K\x00' + x + b'K\x01' + x + b'u') + b'.',
    NESTED,
  ),
  'a long list many times': (
    b']' + put(0) + b'(' + b'N' * 9999 + b'e](' + get(0) * 9999 + b'e.',
    NESTED,
  ),
  'tuples in tuples': (b')' + b'\x85' * 200000 + b'.', NESTED),
  'a list in itself': (b']' + put(0) + get(0) + b'a.', NESTED),
  'keys of one hash': (
    b'}(' + b''.join(number(k * (2**61 - 1)) + b'N' for k in range(50000)) + b'u.',
    'neither a name nor a small number',
  ),
  'many instructions': (b'N' * 3_000_000 + b'.', 'has more than 500000 instructions'),
  'a number of many digits': (b'L' + b'9' * 4000 + b'L\n.', 'has the instruction LONG,'),
  'a number of many bytes': (b'\x8a\xff' + b'\x7f' * 255 + b'.', 'of more than 128 bits'),
  'copies on the stack': (b']' + b'2' * 1000 + b'.', 'has the instruction DUP,'),
  'a tensor larger than its storage': (
    tensor_program(0, (30000, 30000), (0, 0), 1000)[2:],
    'has a tensor of more elements than the 1000 of its storage;',
  ),
  'many tensors of one storage': (
    b'](' + TENSOR * 100 + b'e.',
    'has arrays that together are over 4 times as large as it is',
  ),
  'one tensor many times': (
    TENSOR + put(0) + b'](' + get(0) * 1000 + b'e.',
    'has arrays that together are over 4 times as large as it is',
  ),
}


def ending_of_load(path):
  """What `torch_file.load` ends with in a process of little memory and time."""
  code = (
    'import pathlib, resource, sys\n'
    'from runtime import torch_file\n'
    'resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n'
    'resource.setrlimit(resource.RLIMIT_CPU, (4, 4))\n'
    'try:\n'
    '  print(torch_file.load(pathlib.Path(sys.argv[1])))\n'
    'except Exception as error:\n'
    '  print(type(error).__name__, error)\n'
  )
  command = [sys.executable, '-c', code, str(path)]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert result.returncode == 0, (result.returncode, result.stderr)
  return result.stdout.strip()


@pytest.mark.parametrize('legacy', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('what', PROGRAMS)
def test_program_that_asks_for_much_is_refused_at_once(what, legacy, tmp_path):
  program, found = PROGRAMS[what]
  path, storage = tmp_path / 'hostile.pth', np.zeros(1000, np.float32)
  write_zip(path, START + program, {'0': storage})
  if legacy:
    before = torch_file.LEGACY_MAGIC + b'.' + (START + b'}.') * 2
    after = START + b'](X\x01\x00\x00\x000e.' + struct.pack('<Q', 1000) + storage.tobytes()
    path.write_bytes(before + START + program + after)
  ending = ending_of_load(path)
  assert ending.startswith(f'UserError {path} has ')
  assert found in ending
  assert ending.endswith('nothing in it was run: get the file from its author again.')


def test_calls_and_references_of_odd_arguments_make_nothing(tmp_path):
  """What would be copied, hashed or repeated for each of many calls is looked at first."""
  long = b'(' + b'N' * 9999 + b't' + put(0)
  text = b'X' + struct.pack('<I', 100) + b'a' * 100 + put(0)
  for program in (
    long + name('torch._utils', '_rebuild_parameter') + get(0) + b'R.',
    text + name('_codecs', 'encode') + get(0) + b'\x85R.',
    text + name('numpy', 'dtype') + get(0) + b'\x85R.',
    name('numpy', 'dtype') + b'X\x01\x00\x00\x00O\x85R.',
    name('collections', 'OrderedDict') + b'](]e\x85R.',
    name('torch._utils', '_rebuild_tensor_v2') + TENSOR + long + get(0) + b'tR.',
    name('torch', 'FloatStorage') + b')R.',
    TENSOR + b')R.',
    long + b'Q.',
    b'NQ.',
    b'N}K\x01a.',
    b'N]K\x01K\x01s.',
    b']' * 3 + b't.',
    b'h\x00.',
    b'R.',
  ):
    path = write_zip(tmp_path / 'odd.pth', START + program, {'0': np.zeros(1000, np.float32)})
    with pytest.raises(UserError) as error:
      conversion.read_state(tiny_config.get_config(), path)
    assert str(error.value).startswith((path, f'--checkpoint={path}'))


def test_a_tensor_cannot_be_given_another_content(tmp_path):
  """`__setstate__` of an array would take any memory for its elements."""
  state = b'(K\x01K\x07\x85' + name('torch', 'LongStorage') + b'\x89]t'
  path = tmp_path / 'state.pth'
  write_zip(path, START + TENSOR + state + b'b.', {'0': np.arange(1000, dtype=np.float32)})
  np.testing.assert_array_equal(torch_file.load(path), np.arange(1000))


def test_a_storage_of_two_types_is_refused(tmp_path):
  other = TENSOR.replace(b'FloatStorage', b'IntStorage')
  path = write_zip(
    tmp_path / 'two.pth', START + b'](' + TENSOR + other + b'e.', {'0': np.zeros(1000, np.float32)}
  )
  with pytest.raises(ValueError, match='storage 0 has 1000 elements of float32, not 1000 of int32'):
    torch_file.load(pathlib.Path(path))


# Archives.


def directory(count, extra=b'', size=0):
  """A ZIP file that is nothing but its list of files, all the same."""
  form = '<4s6H3L5H2L'
  numbers = (20, 20, 0, 0, 0, 0, 0, size, size, 1, len(extra), 0, 0, 0, 0, 0)
  listed = (struct.pack(form, b'PK\x01\x02', *numbers) + b'a' + extra) * count
  local = struct.pack('<4s5H3L2H', b'PK\x03\x04', 20, 0, 0, 0, 0, 0, size, size, 1, 0) + b'a'
  count = min(count, 2**16 - 1)
  end = struct.pack('<4s4H2LH', b'PK\x05\x06', 0, 0, count, count, len(listed), len(local), 0)
  return local + listed + end


@pytest.mark.parametrize(
  ('content', 'found'),
  [
    (directory(300_000), 'Truncated central directory'),
    (directory(200, extra=struct.pack('<2H', 9, 0) * 16000), 'Truncated central directory'),
    (directory(3), 'is a ZIP file of 1 entries without the data.pkl of torch.save;'),
  ],
)
def test_archive_with_a_long_directory_is_refused_at_once(content, found, tmp_path):
  path = tmp_path / 'archive.pth'
  path.write_bytes(content)
  assert found in ending_of_load(path)


def test_entries_that_share_their_bytes_or_claim_too_many_are_refused(tmp_path):
  storage = np.zeros(250_000, np.float32)
  tensors = [
    tensor_program(0, (250_000,), (1,), 250_000)[2:-1].replace(
      b'X\x01\x00\x00\x000', b'X\x01\x00\x00\x00' + key
    )
    for key in (b'0', b'1', b'2')
  ]
  path = tmp_path / 'archive.pth'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', START + b'](' + b''.join(tensors) + b'e.')
    archive.writestr('archive/data/0', storage.tobytes())
    for key in '12':
      shared = zipfile.ZipInfo(f'archive/data/{key}')
      entry = archive.getinfo('archive/data/0')
      for attribute in ('header_offset', 'CRC', 'compress_size', 'file_size'):
        setattr(shared, attribute, getattr(entry, attribute))
      archive.filelist.append(shared)
  assert 'has an entry data/1 that is compressed or larger than the file' in ending_of_load(path)

  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', START + b'](' + tensors[0] + b'e.')
    archive.writestr('archive/data/0', storage.tobytes())
    archive.getinfo('archive/data/0').file_size = 2**50
  assert 'has an entry data/0 that is compressed or larger than the file' in ending_of_load(path)


# MessagePack.


def ext(content):
  return b'\xc9' + struct.pack('>IB', len(content), 1) + content


def array(shape, kind, content):
  return ext(msgpack.packb((shape, kind, content)))


LONG_LISTS = (b'\xdd' + struct.pack('>I', 2**18)) * 900 + b'\x01' * 2**18
ENTRIES = b''.join(msgpack.packb(str(i)) + b'\x80' for i in range(2**17))

MESSAGES = {
  'an array of a larger shape': array((10**9,), 'float32', b'1234'),
  'an array of an endless shape': array((2**40, 2**40), 'float32', b''),
  'an array of objects': array((1,), 'O', b'12345678'),
  'an array of bytes': array((1,), 'V8', b'12345678'),
  'an array of arrays': array((1,), '(9,9)f4', b'1' * 324),
  'a shape of lists': array([[[]]] * 60, 'float32', b''),
  'long lists in lists': LONG_LISTS,
  'long lists in lists in an array': ext(LONG_LISTS),
  'dictionaries in dictionaries': b'\x81\xa1b' * 1000 + b'\x01',
  'more dictionaries in dictionaries': b'\x81\xa1b' * 100_000 + b'\x01',
  'lists in lists': b'\x91' * 100_000 + b'\x01',
  'many empty dictionaries in lists': (b'\x9f' + b'\x80' * 15) * 20_000,
  'many empty dictionaries': b'\xdf' + struct.pack('>I', 2**17) + ENTRIES,
  'an unknown extension': b'\xd4\x07a',
  'nothing': b'\xc0',
}


@pytest.fixture
def traced():
  """The time since the test began, and the largest memory that was held."""
  tracemalloc.start()
  begun = time.monotonic()
  yield lambda: (time.monotonic() - begun, tracemalloc.get_traced_memory()[1])
  tracemalloc.stop()


@pytest.mark.parametrize('what', MESSAGES)
def test_message_of_flax_that_asks_for_much_is_refused_at_once(what, tmp_path, traced):
  path = tmp_path / 'checkpoint_1'
  path.write_bytes(b'\x81\xa9optimizer' + MESSAGES[what])
  with pytest.raises(UserError) as error:
    conversion.read_state(tiny_config.get_config(), str(path))
  seconds, memory = traced()
  assert str(path) in str(error.value)
  assert seconds < 3  # one, and the tracing of memory
  assert memory < 2**25

  with pytest.raises(UserError, match='is not a file of parameters|does not fit the classifier'):
    utils.create_classifier(
      jax.random.PRNGKey(0), 1, path, blocks_per_group=1, channel_multiplier=1
    )


# Headers and metadata of safetensors.


@pytest.mark.parametrize(
  'header',
  [
    {'params/x': {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 2**42]}},
    {'params/x': {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 8]}},
    {'params/x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [8, 0]}},
    {'params/x': {'dtype': 'F32', 'shape': [2**40] * 9, 'data_offsets': [0, 8]}},
    {f'params/{i}': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]} for i in range(9)},
    {'params/x': {'dtype': 'F4096', 'shape': [2], 'data_offsets': [0, 8]}},
    {},
    '[' * 100_000,
  ],
)
def test_headers_of_safetensors_that_lie_are_refused(header, tmp_path, traced):
  if isinstance(header, dict):
    header = json.dumps({'__metadata__': {'step': '1', 'classifier': '{}'}} | header)
  header = header.replace('[[', '{[', 1)
  path = tmp_path / 'lies.safetensors'
  path.write_bytes(struct.pack('<Q', len(header)) + header.encode() + bytes(8))
  with pytest.raises(UserError) as error:
    conversion.read_state(tiny_config.get_config(), str(path))
  assert str(path) in str(error.value)
  with pytest.raises(UserError, match=r'is not a classifier \('):
    classifier.read_classifier_file(path)
  seconds, memory = traced()
  assert seconds < 3
  assert memory < 2**25


INFO = {
  'name': 'tiny',
  'fields': {'num_classes': 2, 'width': 4},
  'image_shape': [8, 8, 1],
  'sigma_min': 0.01,
  'sigma_max': 80.0,
}


def write_classifier(path, info, arrays=None):
  weights = {'Conv_0/kernel': np.zeros((1, 1), np.float32)} if arrays is None else arrays
  path.write_bytes(safetensors.numpy.save(weights, info))
  return path


@pytest.mark.parametrize(
  ('info', 'found'),
  [
    (None, 'has no "classifier", but none'),
    ({'step': '3', 'config': '{}'}, 'has no "classifier", but config, step'),
    ('sigma', 'its metadata is not JSON'),
    ('[' * 100_000, 'its metadata is not JSON'),
    ('1' * 5000, 'its metadata is not JSON'),
    ('[1, 2]', 'its metadata is not a JSON object'),
    ('null', 'its metadata is not a JSON object'),
    ('{}', 'its metadata lacks fields, image_shape, name, sigma_max, sigma_min'),
    (INFO | {'name': ['tiny']}, "says name=['tiny'], which cannot be"),
    (INFO | {'name': 'unheard'}, "says name='unheard', which cannot be"),
    (INFO | {'fields': [2, 4]}, 'says fields=[2, 4], which cannot be'),
    (INFO | {'image_shape': [8, 8]}, 'says image_shape=[8, 8], which cannot be'),
    (INFO | {'image_shape': [10**9, 10**9, 3]}, 'says image_shape=[1000000000, 1000000000, 3]'),
    (INFO | {'image_shape': '888'}, "says image_shape='888', which cannot be"),
    (INFO | {'sigma_min': float('nan')}, 'says sigma_min=nan, which cannot be'),
    (INFO | {'sigma_min': 0}, 'says sigma_min=0, which cannot be'),
    (INFO | {'sigma_max': float('inf')}, 'says sigma_max=inf, which cannot be'),
    (INFO | {'sigma_max': '80'}, "says sigma_max='80', which cannot be"),
    (INFO | {'sigma_max': 0.001}, 'its sigma_min is 0.01, its sigma_max 0.001'),
  ],
)
def test_classifier_with_other_metadata_is_refused_with_what_it_says(info, found, tmp_path):
  if isinstance(info, dict) and 'config' not in info:
    info = json.dumps(info)
  metadata = {'classifier': info} if isinstance(info, str) else info
  path = write_classifier(tmp_path / 'classifier.safetensors', metadata)
  for read in (
    classifier.read_classifier_file,
    lambda path: utils.create_classifier(jax.random.PRNGKey(0), 1, path),
  ):
    with pytest.raises(UserError) as error:
      read(path)
    message = str(error.value)
    assert message.startswith(f'{path} is not a classifier (its ')
    assert found in message
    assert message.endswith(
      '): give the classifier.safetensors of a run of --mode=train_classifier.'
    )


@pytest.mark.parametrize(
  ('fields', 'change', 'found'),
  [
    ({}, {'Dense_0/bias': None}, 'missing: Dense_0/bias'),
    ({}, {'/'.join('abc' * 1000): np.zeros(1)}, 'does not fit the classifier tiny with'),
    ({}, {'Conv_1/bias': np.zeros(4)}, 'unexpected: Conv_1/bias'),
    ({}, {'Conv_0/bias': np.full(4, np.nan)}, 'not finite: Conv_0/bias'),
    ({}, {'Conv_0/bias': np.zeros(4, bool)}, 'not arrays of numbers: Conv_0/bias'),
    ({'width': 5}, {}, 'of another shape: Conv_0/bias (4,) instead of (5,)'),
    ({'width': -1}, {}, 'does not fit the classifier tiny with'),
    ({'width': 'wide'}, {}, 'does not fit the classifier tiny with'),
    ({'depth': 28}, {}, "says fields={'num_classes': 2, 'width': 4, 'depth': 28}, which"),
  ],
)
def test_classifier_whose_parameters_do_not_fit_its_fields_is_refused(
  fields, change, found, tmp_path
):
  classifier = TinyClassifier(num_classes=2, width=4)
  shapes = jax.eval_shape(
    lambda key: classifier.init(key, np.zeros((1, 8, 8, 1)), np.ones(1)), jax.random.PRNGKey(0)
  )
  arrays = {
    '/'.join(key.key for key in path[1:]): np.zeros(leaf.shape, np.float32)
    for path, leaf in jax.tree.leaves_with_path(shapes)
  }
  arrays = {key: x for key, x in (arrays | change).items() if x is not None}
  info = INFO | {'fields': INFO['fields'] | fields}
  path = write_classifier(tmp_path / 'c', {'classifier': json.dumps(info)}, arrays)
  with pytest.raises(UserError) as error:
    utils.create_classifier(jax.random.PRNGKey(0), 1, path)
  assert found in str(error.value)
  assert '\n' not in str(error.value)


def test_classifier_with_a_parameter_in_a_parameter_is_refused(tmp_path):
  arrays = {'a': np.zeros(2, np.float32), 'a/b': np.zeros(2, np.float32)}
  path = write_classifier(tmp_path / 'c', {'classifier': json.dumps(INFO)}, arrays)
  with pytest.raises(UserError, match='is not a classifier'):
    utils.create_classifier(jax.random.PRNGKey(0), 1, path)
