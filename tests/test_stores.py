"""Stores: which pictures a folder or file holds, their bytes and labels, and what is refused."""

import concurrent.futures
import io
import json
import os
import pathlib
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from runtime.errors import UserError
from sources import stores
from sources.base import BadPicture
from tests.processes import ROOT

pyarrow = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')


def encoded(value):
  """A PNG of a single grey level."""
  file = io.BytesIO()
  Image.fromarray(np.full((2, 3), value, np.uint8)).save(file, 'png')
  return file.getvalue()


@pytest.fixture
def folder(tmp_path):
  """Makes pictures by name."""

  def make(*names):
    for i, name in enumerate(names):
      path = tmp_path / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(encoded(i))
    return tmp_path

  return make


def write_zip(path, contents, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    for name, content in contents.items():
      archive.writestr(name, content)
  return path


def names(store):
  return [file.name for file in store.files()]


def outcome(call, *args):
  """What a call returns, or the sentence that it ends in."""
  try:
    return call(*args)
  except (UserError, BadPicture) as error:
    return str(error)


def faults(store):
  return {file.name: file.fault for file in store.files() if file.fault}


# --- folders ---


def test_pictures_are_listed_in_code_point_order_of_their_names(folder):
  expected = sorted(['Z.png', 'a.b/1.png', 'a/1.JPG', 'a/10.png', 'a/2.tiff', 'a0.gif', 'é.webp'])
  store = stores.open_store(folder(*reversed(expected)))
  assert names(store) == expected
  for file in store.files():
    assert store.read(file) == encoded(expected[::-1].index(file.name))


def test_linked_folders_are_followed_once_and_cycles_end(folder, tmp_path):
  root = folder('set/real/1.png', 'elsewhere/2.png', 'elsewhere/deep/3.png')
  (tmp_path / 'set' / 'a').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'set' / 'again').symlink_to(tmp_path / 'elsewhere' / 'deep')
  (tmp_path / 'elsewhere' / 'up').symlink_to(tmp_path / 'set')
  (tmp_path / 'set' / 'before').symlink_to(tmp_path / 'set' / 'real')
  (tmp_path / 'set' / 'one.png').symlink_to(tmp_path / 'elsewhere' / '2.png')
  store = stores.open_store(root / 'set')
  assert names(store) == ['a/2.png', 'a/deep/3.png', 'one.png', 'real/1.png']
  assert not faults(store)


def test_what_looks_like_a_picture_and_is_not_used_has_a_reason(folder, tmp_path):
  root = folder('1.png', '.hidden.png', '._x.jpg', '.cache/1.png', '__MACOSX/2.png', 'c.png/1.png')
  (tmp_path / 'empty.png').touch()
  (tmp_path / 'new.svg').write_bytes(b'<svg>')
  for name in ('notes.txt', 'labels.csv', '.DS_Store', '00.npy'):
    (tmp_path / name).write_bytes(b'x')
  (tmp_path / 'gone.png').symlink_to(tmp_path / 'nothing.png')
  (tmp_path / 'moved').symlink_to(tmp_path / 'no_such_folder')
  os.mkfifo(tmp_path / 'pipe.png')
  with (tmp_path / 'huge.png').open('wb') as file:
    file.truncate(stores.MAX_BYTES + 1)  # takes no space
  assert faults(stores.open_store(root)) == {
    '.hidden.png': 'hidden file',
    '._x.jpg': 'hidden file',
    '.cache': 'hidden folder',
    '__MACOSX': 'hidden folder',
    'c.png': 'folder named .png',
    'empty.png': 'empty file',
    'gone.png': 'broken link',
    'huge.png': 'more than 256 MiB',
    'moved': 'broken link',
    'new.svg': 'unsupported format .svg',
    'pipe.png': 'not a regular file',
  }
  assert names(stores.open_store(root))[:3] == ['._x.jpg', '.cache', '.hidden.png']


def test_folder_that_cannot_be_read_is_named(folder, monkeypatch):
  root = folder('a/1.png', 'b/2.png')
  scandir = os.scandir

  def denied(path):
    if path.endswith(refused):
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  store = stores.open_store(root)
  monkeypatch.setattr(os, 'scandir', denied)
  refused = '/a'
  assert faults(store) == {'a/': 'Permission denied'}
  refused = root.name
  with pytest.raises(UserError, match='^Permission denied: give a folder of pictures.$'):
    store.files()


def test_file_that_is_gone_is_a_bad_picture(folder, tmp_path):
  store = stores.open_store(folder('1.png', '2.png'))
  files = store.files()
  (tmp_path / '1.png').unlink()
  with pytest.raises(BadPicture, match='No such file'):
    store.read(files[0])


def test_what_no_store_knows_is_refused(tmp_path):
  with pytest.raises(UserError, match='it does not exist: give a folder or file'):
    stores.open_store(tmp_path / 'nowhere')
  (tmp_path / 'x.rar').write_bytes(b'Rar!')
  with pytest.raises(UserError, match='no reader knows it: give one of .*a folder, a ZIP file'):
    stores.open_store(tmp_path / 'x.rar')


def test_home_folder_is_expanded(folder, monkeypatch):
  monkeypatch.setenv('HOME', str(folder('pictures/1.png')))
  assert names(stores.open_store('~/pictures')) == ['1.png']


def test_own_store_can_be_registered(tmp_path, monkeypatch):
  monkeypatch.setattr(stores.STORES, '_entries', dict(stores.STORES._entries))

  @stores.register_store(name='a list')
  class ListStore(stores.Store):
    def __init__(self, path):
      self.names = path.read_text().split()

    @classmethod
    def recognises(cls, path):
      return path.suffix == '.list'

    def files(self):
      return [stores.File(name) for name in self.names]

    def read(self, file):
      return encoded(int(file.name))

  (tmp_path / 'x.list').write_text('3 5')
  store = stores.open_store(tmp_path / 'x.list')
  found = stores.PictureFiles(store, store.files(), num_channels=1)
  assert [int(found.read(i)[0].max()) for i in range(2)] == [3, 5]


# --- ZIP ---


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_holds_what_its_folder_holds(tmp_path, compression):
  contents = {f'{c}/{i}.png': encoded(i) for c in ('a', 'ü') for i in range(5)}
  extra = {'a/notes.txt': b'x', '__MACOSX/a/._1.png': b'x', 'a/.x.png': b'x', 'a/e.png': b''}
  store = stores.open_store(write_zip(tmp_path / 'x.ZIP', contents | extra, compression))
  assert faults(store) == {
    '__MACOSX/a/._1.png': 'hidden file',
    'a/.x.png': 'hidden file',
    'a/e.png': 'empty file',
  }
  used = [file for file in store.files() if not file.fault]
  assert [file.name for file in used] == sorted(contents)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    read = list(pool.map(store.read, used * 50))
  assert read == [contents[file.name] for file in used] * 50


def test_folder_around_all_of_a_zip_is_left_out_unless_it_is_a_split(tmp_path):
  for folder, expected in (('pictures/', ''), ('train/', 'train/')):
    contents = {f'{folder}{i}/{i}.png': encoded(i) for i in range(3)}
    store = stores.open_store(write_zip(tmp_path / 'x.zip', contents | {'__MACOSX/x': b''}))
    assert names(store) == [f'{expected}{i}/{i}.png' for i in range(3)]
    assert [store.read(file) for file in store.files()] == [encoded(i) for i in range(3)]


@pytest.mark.parametrize('kind', ['folder', 'zip', 'zip in a folder'])
def test_labels_of_edm_and_stylegan_are_read(tmp_path, kind, caplog):
  contents = {f'0000{i}/img{i}.png': encoded(i) for i in range(3)}

  def labels_of(about):
    members = contents | {'dataset.json': about.encode()}
    if kind == 'folder':
      for name, content in members.items():
        (tmp_path / 'x' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'x' / name).write_bytes(content)
      return [file.label for file in stores.open_store(tmp_path / 'x').files()]
    around = 'all/' if kind == 'zip in a folder' else ''
    path = write_zip(tmp_path / 'x.zip', {around + name: c for name, c in members.items()})
    return [file.label for file in stores.open_store(path).files()]

  labels = [['00000/img0.png', 6], ['00002/img2.png', 0], ['00001/img1.png', 3]]
  assert labels_of(json.dumps({'labels': labels})) == [6, 3, 0]
  assert labels_of(json.dumps({'labels': labels[:2]})) == [6, None, 0]
  assert labels_of(json.dumps({'labels': [[name, float(i)] for name, i in labels]})) == [6, 3, 0]
  assert labels_of(json.dumps({'labels': None})) == [0, 0, 0]
  assert not caplog.records
  assert labels_of(json.dumps({'labels': [['00000/img0.png', [0.5, 0.5]]]})) == [None] * 3
  assert "'00000/img0.png' the label [0.5, 0.5], which is not a whole number" in caplog.text
  assert labels_of(json.dumps({'name': 'of another tool'})) == [None] * 3
  for damaged in ('{"labels": [', '{"labels": 3}', '[' * 100_000):
    with pytest.raises(UserError, match='its dataset.json is damaged .*: copy it again or remove'):
      labels_of(damaged)


def test_one_folder_in_an_archive_of_edm_stays_in_the_names(tmp_path):
  members = {'00000/img0.png': encoded(0), 'dataset.json': b'{"labels": [["00000/img0.png", 4]]}'}
  (file,) = stores.open_store(write_zip(tmp_path / 'x.zip', members)).files()
  assert (file.name, file.label) == ('00000/img0.png', 4)


def test_truncated_zip_is_refused(tmp_path):
  path = write_zip(tmp_path / 'x.zip', {f'{i}.png': encoded(i) for i in range(9)})
  content = path.read_bytes()
  for length in (0, 10, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:length])
    with pytest.raises(UserError, match='not a complete ZIP file .*: copy or download it again'):
      stores.open_store(path)


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_flipped_bits_in_a_zip_end_in_a_sentence_and_never_in_other_bytes(tmp_path, compression):
  contents = {f'{i}.png': encoded(i) for i in range(9)}
  path = write_zip(tmp_path / 'x.zip', contents, compression)
  good = path.read_bytes()
  draw = random.Random(0)
  outcomes = []
  for _ in range(300):
    damaged = bytearray(good)
    damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
    path.write_bytes(damaged)
    store = outcome(stores.open_store, path)
    if isinstance(store, str):
      outcomes.append(store)
    else:
      outcomes += [outcome(store.read, file) for file in store.files() if not file.fault]
  sentences = [found for found in outcomes if isinstance(found, str)]
  assert {found for found in outcomes if isinstance(found, bytes)} == set(contents.values())
  assert any('complete ZIP file' in sentence for sentence in sentences)
  assert any('damaged in the archive' in sentence for sentence in sentences)
  assert not any('\n' in sentence for sentence in sentences)


def test_encrypted_and_oddly_compressed_members_have_a_fault(tmp_path):
  path = write_zip(tmp_path / 'x.zip', {'1.png': encoded(1)})
  content = bytearray(path.read_bytes())
  content[content.index(b'PK\1\2') + 8] |= 1  # the flag in the list of members
  path.write_bytes(content)
  assert faults(stores.open_store(path)) == {'1.png': 'encrypted'}
  write_zip(path, {'1.png': encoded(1)}, zipfile.ZIP_LZMA)
  assert faults(stores.open_store(path)) == {'1.png': 'compressed by a method other than deflate'}


def test_member_that_claims_or_hides_an_absurd_size_is_not_unpacked(tmp_path):
  path = write_zip(tmp_path / 'x.zip', {'1.png': bytes(10_000_000)}, zipfile.ZIP_DEFLATED)
  good = path.read_bytes()
  entry = good.index(b'PK\1\2')

  def with_size(size):
    changed = bytearray(good)
    changed[entry + 24 : entry + 28] = size.to_bytes(4, 'little')
    path.write_bytes(changed)
    return stores.open_store(path)

  assert faults(with_size(2**31)) == {'1.png': 'more than 256 MiB'}
  store = with_size(100)
  with pytest.raises(BadPicture, match='damaged in the archive: its checksum'):
    store.read(store.files()[0])


def test_names_that_point_outside_are_only_names(tmp_path):
  path = write_zip(tmp_path / 'x.zip', {'../../1.png': encoded(1), '/etc/2.png': encoded(2)})
  store = stores.open_store(path)
  assert [store.read(file) for file in store.files()] == [encoded(1), encoded(2)]
  assert os.listdir(tmp_path) == ['x.zip']


# --- Parquet and Arrow ---


STRUCT = [('bytes', pyarrow.binary()), ('path', pyarrow.string())]


def table(values, labels=None, column='image', binary=False, class_names=None):
  """Encoded grey levels as Hugging Face stores them, or as a binary column."""
  content = [None if value is None else encoded(value) for value in values]
  if binary:
    columns = {column: pyarrow.array(content, pyarrow.binary())}
  else:
    rows = [{'bytes': c, 'path': f'{v}.png'} for c, v in zip(content, values, strict=True)]
    columns = {column: pyarrow.array(rows, pyarrow.struct(STRUCT))}
  columns['width'] = pyarrow.array([3] * len(values))
  if labels is not None:
    columns['label'] = pyarrow.array(labels)
  result = pyarrow.table(columns)
  if class_names is None:
    return result
  about = {'info': {'features': {'label': {'names': class_names, '_type': 'ClassLabel'}}}}
  return result.replace_schema_metadata({'huggingface': json.dumps(about)})


def write(path, rows, **options):
  """Writes a table by the suffix; `stream` chooses between the two formats of Arrow."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.parquet':
    parquet.write_table(rows, path, row_group_size=options.get('group', 4))
    return path
  new = pyarrow.ipc.new_stream if options.get('stream') else pyarrow.ipc.new_file
  with new(path, rows.schema) as writer:
    writer.write_table(rows, max_chunksize=4)
  return path


KINDS = [('parquet', {}), ('parquet', {'group': 100}), ('arrow', {}), ('arrow', {'stream': True})]


@pytest.mark.parametrize(('suffix', 'options'), KINDS)
@pytest.mark.parametrize('binary', [False, True])
def test_rows_are_read_in_any_order_and_by_several_threads(tmp_path, suffix, options, binary):
  labels = [i % 3 for i in range(100)]
  rows = table(range(100), labels, binary=binary, class_names=['a', 'b', 'c'])
  store = stores.open_store(write(tmp_path / f'x.{suffix}', rows, **options))
  files = store.files()
  assert [file.name for file in files] == [f'{i:08d}' for i in range(100)]
  assert [file.label for file in files] == labels
  assert store.class_names == ['a', 'b', 'c']
  order = [*range(100), *range(99, -1, -1), *random.Random(0).sample(range(100), 100)]
  expected = [encoded(i) for i in order]
  assert [store.read(files[i]) for i in order] == expected
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert list(pool.map(lambda i: store.read(files[i]), order)) == expected


@pytest.mark.parametrize('suffix', ['parquet', 'arrow'])
def test_column_is_found_by_type_and_name(tmp_path, suffix):
  path = tmp_path / f'x.{suffix}'

  def first(rows):
    store = stores.open_store(write(path, rows))
    return store.read(store.files()[0])

  mask = table([9])['image']
  assert first(table([1], column='img').append_column('mask', mask)) == encoded(1)
  assert first(table([2], column='photo')) == encoded(2)
  with pytest.raises(
    UserError, match='has 2 columns of pictures, of the columns photo, width, mask'
  ):
    first(table([3], column='photo').append_column('mask', mask))
  with pytest.raises(UserError, match=f'file x.{suffix} has 0 columns of pictures, .* width: name'):
    first(table([3]).drop_columns('image'))


def test_row_without_bytes_and_negative_labels(tmp_path):
  store = stores.open_store(write(tmp_path / 'x.parquet', table([1, None], labels=[-1, 2])))
  files = store.files()
  assert [file.label for file in files] == [None, 2]
  with pytest.raises(BadPicture, match='^no bytes in its row$'):
    store.read(files[1])


def test_shards_of_a_folder_are_sorted_into_splits_by_their_names(tmp_path):
  write(tmp_path / 'data' / 'train-00000-of-00002.parquet', table([0, 1]))
  write(tmp_path / 'data' / 'train-00001-of-00002.parquet', table([2]))
  write(tmp_path / 'data' / 'validation-00000-of-00001.parquet', table([3]))
  store = stores.open_store(tmp_path)
  assert names(store) == [
    'train/data-train-00000-of-00002-00000000',
    'train/data-train-00000-of-00002-00000001',
    'train/data-train-00001-of-00002-00000000',
    'validation/data-validation-00000-of-00001-00000000',
  ]
  assert [store.read(file) for file in store.files()] == [encoded(i) for i in range(4)]


def test_folders_that_hugging_face_saves_are_read(tmp_path):
  write(tmp_path / 'train' / 'data-00000-of-00001.arrow', table([0, 1]), stream=True)
  write(tmp_path / 'train' / 'cache-0123456789.arrow', table([7]), stream=True)
  write(tmp_path / 'test' / 'data-00000-of-00001.arrow', table([2]), stream=True)
  (tmp_path / 'dataset_dict.json').write_text('{}')
  store = stores.open_store(tmp_path)
  assert [file.name.partition('/')[0] for file in store.files()] == ['test', 'train', 'train']


def test_pictures_beside_a_table_win(tmp_path, folder):
  write(tmp_path / 'labels.parquet', pyarrow.table({'label': [1]}))
  assert names(stores.open_store(folder('a/1.png'))) == ['a/1.png']


@pytest.mark.parametrize(('suffix', 'options'), KINDS)
def test_damaged_tables_end_in_a_sentence_and_not_in_a_crash(tmp_path, suffix, options):
  path = write(tmp_path / f'x.{suffix}', table(range(20), labels=list(range(20))), **options)
  good = path.read_bytes()
  draw = random.Random(0)
  damaged = [good[: draw.randrange(len(good))] for _ in range(20)]
  for _ in range(100):
    flipped = bytearray(good)
    flipped[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
    damaged.append(bytes(flipped))
  for content in damaged:
    path.write_bytes(content)
    store = outcome(stores.open_store, path)
    outcomes = (
      [store] if isinstance(store, str) else [outcome(store.read, f) for f in store.files()]
    )
    assert not any(isinstance(found, str) and '\n' in found for found in outcomes)


def test_reading_goes_on_after_a_damaged_group(tmp_path):
  path = write(tmp_path / 'x.parquet', table(range(12)))
  store = stores.open_store(path)
  files = store.files()
  start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
  content = bytearray(path.read_bytes())
  content[start : start + 60] = bytes(60)
  path.write_bytes(content)
  outcomes = [outcome(store.read, file) for file in files]
  assert outcomes[:4] + outcomes[8:] == [encoded(i) for i in (0, 1, 2, 3, 8, 9, 10, 11)]
  assert all(reason.startswith('damaged in x.parquet: ') for reason in outcomes[4:8])


def test_pyarrow_is_imported_for_tables_only(folder):
  code = (
    'import sys; from sources import stores; stores.open_store(sys.argv[1]).files(); '
    "assert 'pyarrow' not in sys.modules"
  )
  command = [sys.executable, '-c', code, str(folder('1.png'))]
  subprocess.run(command, cwd=ROOT, check=True)


# --- NumPy ---


def test_arrays_are_pictures_of_every_number_of_channels(tmp_path):
  draw = np.random.default_rng(0)
  for shape in ((3, 5, 4), (3, 5, 4, 1), (3, 5, 4, 2), (3, 5, 4, 3), (3, 5, 4, 4)):
    images = draw.integers(0, 256, shape, np.uint8)
    np.savez(tmp_path / 'x.npz', images=images, labels=np.array([2, 0, 1]))
    store = stores.open_store(tmp_path / 'x.npz')
    assert [file.label for file in store.files()] == [2, 0, 1]
    stored = [np.asarray(Image.open(io.BytesIO(store.read(file)))) for file in store.files()]
    np.testing.assert_array_equal(np.reshape(stored, shape), images)


@pytest.mark.parametrize('arrays', [{'samples': 0}, {'arr_0': 0}, {'arr_0': 0, 'arr_1': 1}])
def test_arrays_are_found_by_their_names(tmp_path, arrays):
  values = [np.zeros((2, 4, 4, 3), np.uint8), np.array([1, 0])]
  np.savez(tmp_path / 'x.npz', **{name: values[i] for name, i in arrays.items()}, other=np.ones(3))
  files = stores.open_store(tmp_path / 'x.npz').files()
  assert [file.label for file in files] == ([1, 0] if 'arr_1' in arrays else [None, None])


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    ({'x': np.zeros(3)}, 'of its arrays, x, none is named images or samples or arr_0'),
    ({'images': np.zeros((2, 4, 4, 3))}, r'type float64 and shape \(2, 4, 4, 3\): give uint8'),
    ({'images': np.zeros((2, 3, 4, 5), np.uint8)}, r'shape \(2, 3, 4, 5\): give uint8 .N, H, W'),
    (
      {'images': np.zeros((2, 4, 4), np.uint8), 'labels': np.zeros(3, int)},
      r'labels have type int64 and shape \(3,\): give whole numbers, \(2,\)',
    ),
  ],
)
def test_unusable_arrays_are_refused(tmp_path, arrays, message):
  np.savez(tmp_path / 'x.npz', **arrays)
  with pytest.raises(UserError, match=message):
    stores.open_store(tmp_path / 'x.npz')


def test_damaged_array_file_is_refused(tmp_path):
  path = pathlib.Path(tmp_path / 'x.npz')
  np.savez(path, images=np.zeros((9, 4, 4), np.uint8))
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(UserError, match='it cannot be used .*: write it with np.savez'):
    stores.open_store(path)
