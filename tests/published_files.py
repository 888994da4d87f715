"""Small files in the formats in which the authors of data sets publish theirs."""

import dataclasses
import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
import zipfile

import crc32c
import numpy as np
import scipy.io
from ml_collections import ConfigDict
from PIL import Image

from sources import published


def data_config(tmp_path, dataset, size, **settings):
  """A configuration with the keys that data sets read."""
  data = {
    'dataset': dataset,
    'image_size': size,
    'num_channels': 3,
    'path': str(tmp_path),
    'cache_dir': str(tmp_path / 'cache'),
    'num_workers': 2,
    'max_bad': 0,
  }
  return ConfigDict({'data': data | settings})


def publish(monkeypatch, path, **changes):
  """Makes a generated file the published one of its name."""
  content = path.read_bytes()
  known = published.FILES[path.name]
  facts = {'checksum': f'md5:{hashlib.md5(content).hexdigest()}'}
  facts |= {'size': known.size and len(content)}
  file = dataclasses.replace(known, **(facts | changes))
  monkeypatch.setitem(published.FILES, path.name, file)


# CIFAR-10.


def cifar_levels(count, seed):
  """Levels (N, 3, 32, 32) and labels (N,)."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, 3, 32, 32), np.uint8), rng.integers(0, 10, count)


CIFAR_BATCHES = {**{f'data_batch_{i}': i for i in range(1, 6)}, 'test_batch': 6}


def cifar_binary(levels, labels):
  """One file of the binary archive."""
  records = [
    np.uint8([label]).tobytes() + x.tobytes() for x, label in zip(levels, labels, strict=True)
  ]
  return b''.join(records)


def _text(value):
  """A short or long byte string of Python 2."""
  if len(value) < 256:
    return b'U' + bytes([len(value)]) + value
  return b'T' + struct.pack('<i', len(value)) + value


def cifar_pickle(levels, labels):
  """One file of the Python archive: instruction by instruction what Python 2 and NumPy wrote."""
  rows = levels.reshape(len(levels), -1)
  number_type = b'cnumpy\ndtype\n(' + _text(b'u1') + b'K\x00K\x01tR('
  number_type += b'K\x03' + _text(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
  array = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t' + _text(b'b') + b'tR('
  array += b'K\x01(' + b'M' + struct.pack('<H', len(rows)) + b'M' + struct.pack('<H', 3072) + b't'
  array += number_type + b'\x89' + _text(rows.tobytes()) + b'tb'
  items = _text(b'batch_label') + _text(b'batch') + _text(b'data') + array
  items += _text(b'labels') + b'](' + b''.join(b'K' + bytes([n]) for n in labels) + b'e'
  return b'\x80\x02}(' + items + b'u.'


def cifar_members(encode, suffix=''):
  """The files of an archive by their names."""
  return {
    name + suffix: encode(*cifar_levels(4 if seed < 6 else 3, seed))
    for name, seed in CIFAR_BATCHES.items()
  }


def write_tar(path, folder, members):
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(f'{folder}/{name}')
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return path


def cifar_binary_archive(folder):
  members = {'batches.meta.txt': b'airplane\n'} | cifar_members(cifar_binary, '.bin')
  return write_tar(folder / 'cifar-10-binary.tar.gz', 'cifar-10-batches-bin', members)


def cifar_python_archive(folder, **changes):
  members = {'batches.meta': pickle.dumps({}, 2)} | cifar_members(cifar_pickle) | changes
  return write_tar(folder / 'cifar-10-python.tar.gz', 'cifar-10-batches-py', members)


# SVHN.


def svhn_file(path, count=7, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (32, 32, 3, count), np.uint8)
  labels = np.uint8([10, *rng.integers(1, 10, count - 1)]).reshape(-1, 1)
  scipy.io.savemat(path, {'X': images, 'y': labels}, do_compression=True)
  return images, labels


# Pictures.


def smooth_picture(height, width, seed):
  """A picture without sharp edges, which a lossy format keeps."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
  return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels, kind, **options):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind, **options)
  return file.getvalue()


def decoded(content):
  return np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))


def celeba(folder, count=6):
  """The archive and the list; returns the pictures as they are decoded, by name."""
  names = [f'{i + 1:06d}.jpg' for i in range(count)]
  contents = [encoded(smooth_picture(218, 178, i), 'jpeg', quality=95) for i in range(count)]
  with zipfile.ZipFile(folder / 'img_align_celeba.zip', 'w') as archive:
    archive.writestr('img_align_celeba/', b'')
    for name, content in zip(names, contents, strict=True):
      archive.writestr(f'img_align_celeba/{name}', content)
  lines = [f'{name} {i % 3}\n' for i, name in enumerate(names)]
  (folder / 'list_eval_partition.txt').write_text(''.join(lines))
  return dict(zip(names, map(decoded, contents), strict=True))


def lsun_zip(folder, name, pictures):
  """A ZIP file `<name>.zip` of an LMDB database of WebP pictures; returns these as decoded."""
  import lmdb

  base = folder / f'made-{name}'
  contents = {
    hashlib.sha1(bytes([i])).hexdigest(): encoded(x, 'webp', quality=90)
    for i, x in enumerate(pictures)
  }
  opened = lmdb.open(str(base), map_size=2**26)
  with opened.begin(write=True) as transaction:
    for key, content in contents.items():
      transaction.put(key.encode(), content)
  opened.close()
  path = folder / f'{name}.zip'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('../escaped.txt', b'')
    for member in ('data.mdb', 'lock.mdb'):
      archive.write(base / member, f'{name}/{member}')
  return {key: decoded(contents[key]) for key in sorted(contents)}


# TFRecord.


def _varint(n):
  low, n = n & 0x7F, n >> 7
  return bytes([low | 0x80]) + _varint(n) if n else bytes([low])


def _message(number, content):
  return _varint(number << 3 | 2) + _varint(len(content)) + content


def example(pixels, packed=True):
  """A `tf.train.Example` of an image (H, W, C)."""
  levels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
  numbers = [_varint(n) for n in levels.shape]
  values = _message(1, b''.join(numbers)) if packed else b''.join(b'\x08' + n for n in numbers)
  shape = _message(1, b'shape') + _message(2, _message(3, values))
  data = _message(1, b'data') + _message(2, _message(1, _message(1, levels.tobytes())))
  return _message(1, _message(1, shape) + _message(1, data))


def _checksum(content):
  crc = crc32c.crc32c(content)
  return struct.pack('<I', (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)


def record(content):
  length = struct.pack('<Q', len(content))
  return length + _checksum(length) + content + _checksum(content)


# A web server.


class _Handler(http.server.BaseHTTPRequestHandler):
  """Serves the server's `content`, in parts if it is asked for them."""

  def do_GET(self):
    content, sent = self.server.content, self.headers['Range']
    self.server.ranges.append(sent)
    start = int(sent.removeprefix('bytes=').removesuffix('-')) if sent else 0
    if sent and not self.server.knows_ranges:
      sent, start = None, 0
    if sent and start >= len(content):
      self.send_response(416)
      self.send_header('Content-Range', f'bytes */{len(content)}')
      self.end_headers()
      return
    self.send_response(206 if sent else 200)
    self.send_header('Content-Length', str(len(content) - start))
    self.end_headers()
    stop = self.server.stops.pop(0) if self.server.stops else len(content)
    self.wfile.write(content[start:stop])

  def log_message(self, *_):
    pass


def serve(content, stops=(), knows_ranges=True):
  """A server of `content`, whose first answers end at the bytes `stops`."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
  server.content, server.stops, server.knows_ranges = content, list(stops), knows_ranges
  server.ranges = []
  server.address = f'http://127.0.0.1:{server.server_port}/file'
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return server
