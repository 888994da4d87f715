"""Where own pictures are kept, which of them are used, and how they are split and named."""

import io
import json
import logging
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from runtime.errors import UserError
from sources import splits
from sources.base import BadPicture
from sources.stores import File, FolderStore, ZipStore, open_store


def encoded(value=0, side=1):
  file = io.BytesIO()
  Image.fromarray(np.full((side, side), value, np.uint8)).save(file, 'png')
  return file.getvalue()


@pytest.fixture
def folder(tmp_path):
  """Makes one-pixel pictures by name."""

  def make(*names):
    for name in names:
      path = tmp_path / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(encoded())
    return tmp_path

  return make


def names(files):
  return [file.name for file in files if not file.fault]


def faults(files):
  return {file.name: file.fault for file in files if file.fault}


# --- folders ---


def test_pictures_are_listed_in_code_point_order_of_their_names(folder):
  expected = sorted(['Z.png', 'a.b/1.png', 'a/1.JPG', 'a/10.png', 'a/2.tiff', 'a0.gif', 'é.webp'])
  assert names(FolderStore(folder(*reversed(expected))).files()) == expected


def test_linked_folders_are_followed_once_and_cycles_end(folder, tmp_path):
  root = folder('set/real/1.png', 'elsewhere/2.png', 'elsewhere/deep/3.png')
  (tmp_path / 'set' / 'a').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'set' / 'again').symlink_to(tmp_path / 'elsewhere' / 'deep')
  (tmp_path / 'elsewhere' / 'up').symlink_to(tmp_path / 'set')
  (tmp_path / 'set' / 'before').symlink_to(tmp_path / 'set' / 'real')
  (tmp_path / 'set' / 'one.png').symlink_to(tmp_path / 'elsewhere' / '2.png')
  files = FolderStore(root / 'set').files()
  assert names(files) == ['a/2.png', 'a/deep/3.png', 'one.png', 'real/1.png']
  assert not faults(files)


def test_what_is_no_picture_has_a_fault_or_is_left_out(folder, tmp_path):
  root = folder('1.png', '.hidden.png', '._x.png', '.cache/1.png', 'c.png/1.png')
  (tmp_path / 'empty.png').touch()
  (tmp_path / 'new.svg').write_bytes(b'<svg>')
  for name in ('notes.txt', 'labels.csv', '.DS_Store', '00.npy'):
    (tmp_path / name).write_bytes(b'x')
  (tmp_path / 'gone.png').symlink_to(tmp_path / 'nothing.png')
  (tmp_path / 'moved').symlink_to(tmp_path / 'no_such_folder')
  os.mkfifo(tmp_path / 'pipe.png')
  files = FolderStore(root).files()
  assert names(files) == ['1.png']
  assert faults(files) == {
    '.hidden.png': 'hidden file',
    '._x.png': 'hidden file',
    '.cache': 'hidden folder',
    'c.png': 'folder named .png',
    'empty.png': 'empty file',
    'new.svg': 'unsupported format .svg',
    'gone.png': 'broken link',
    'moved': 'broken link',
    'pipe.png': 'not a regular file',
  }


def test_folders_that_cannot_be_read_are_named(folder, tmp_path, monkeypatch):
  root, scandir = folder('a/1.png', 'b/2.png'), os.scandir

  def denied(path, where):
    if os.fspath(path).endswith(where):
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', lambda path: denied(path, '/a'))
  files = FolderStore(root).files()
  assert names(files) == ['b/2.png']
  assert faults(files) == {'a/': 'Permission denied'}
  monkeypatch.setattr(os, 'scandir', lambda path: denied(path, tmp_path.name))
  with pytest.raises(UserError, match='Permission denied: give a folder of pictures'):
    FolderStore(root).files()


def test_path_that_no_store_knows_is_refused(tmp_path):
  with pytest.raises(UserError, match='it does not exist: give a folder or file of pictures'):
    open_store(tmp_path / 'nowhere')
  (tmp_path / 'x.rar').write_bytes(b'x')
  with pytest.raises(UserError, match='no reader knows it: give one of .*a folder, a ZIP file'):
    open_store(tmp_path / 'x.rar')


# --- ZIP files ---


def zipped(path, members, **options):
  with zipfile.ZipFile(path, 'w', **options) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return path


def test_pictures_of_a_zip_have_the_names_of_the_folder_that_was_packed(tmp_path):
  members = {'mine/cat/1.png': encoded(1), 'mine/dog/2.PNG': encoded(2), 'mine/notes.txt': b'x'}
  members |= {'mine/dog/e.png': b'', '__MACOSX/mine/cat/._1.png': b'x', 'mine/dog/._2.png': b'x'}
  store = open_store(zipped(tmp_path / 'mine.ZIP', members))
  files = store.files()
  assert isinstance(store, ZipStore)
  assert names(files) == ['cat/1.png', 'dog/2.PNG']
  assert faults(files) == {
    'dog/e.png': 'empty file',
    '__MACOSX/mine/cat/._1.png': 'hidden file',
    'dog/._2.png': 'hidden file',
  }
  assert store.read(files[1] if files[1].name == 'cat/1.png' else _of(files, 'cat/1.png'))
  assert store.decode(_of(files, 'dog/2.PNG'), 1, 'white').item() == 2


def _of(files, name):
  return next(file for file in files if file.name == name)


def test_labels_of_the_tools_of_stylegan_and_edm_are_read(tmp_path):
  members = {f'0000{i}/img{i}.png': encoded(i) for i in range(3)}
  labels = [[name, 2 * i] for i, name in enumerate(members)]
  for content, expected in ((labels, [0, 2, 4]), (None, [None] * 3)):
    about = {'dataset.json': json.dumps({'labels': content})}
    store = open_store(zipped(tmp_path / 'edm.zip', members | about))
    assert [file.label for file in store.files()] == expected
  for wrong in ('[1, 2]', '{"labels": [["x"]]}', '{', '{"labels": 3}'):
    with pytest.raises(UserError, match='its dataset.json is not of the form'):
      open_store(zipped(tmp_path / 'edm.zip', members | {'dataset.json': wrong})).files()


def test_damaged_zip_and_damaged_member_are_told_apart(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
  file = io.BytesIO()
  Image.fromarray(noise).save(file, 'png')
  path = zipped(tmp_path / 'x.zip', {'a.png': file.getvalue(), 'b.png': encoded(7)})
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match='it is no complete ZIP file .*: copy or download it again'):
    open_store(path)
  flipped = bytearray(whole)
  flipped[200] ^= 1
  path.write_bytes(flipped)
  store = open_store(path)
  with pytest.raises(BadPicture, match='damaged in the archive'):
    store.read(_of(store.files(), 'a.png'))
  assert store.decode(_of(store.files(), 'b.png'), 1, 'white').item() == 7


def test_member_that_claims_to_be_enormous_is_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr('sources.stores.MAX_BYTES', 100_000)
  bomb = {'bomb.png': bytes(200_000), 'a.png': encoded()}
  store = open_store(zipped(tmp_path / 'x.zip', bomb, compression=zipfile.ZIP_DEFLATED))
  assert faults(store.files()) == {'bomb.png': 'more than 100,000 bytes'}


# --- splits ---


def files_of(*listed):
  return [File(name, 1, 1) for name in listed]


def many(folder, count=20):
  return [f'{folder}/{i:03d}.png' for i in range(count)]


def test_a_hash_of_the_name_splits_and_adding_a_picture_moves_no_other():
  few = splits.split(files_of(*many('a', 1000)))
  more = splits.split(files_of(*many('a', 1000), *many('b', 500)))
  assert 70 < len(few['test']) < 130
  for part in ('train', 'test'):
    assert set(few[part]) <= set(more[part])
  assert sorted(names(few['train'] + few['test'])) == many('a', 1000)
  half = splits.split(files_of(*many('a', 1000)), test_fraction=0.5)
  assert 440 < len(half['test']) < 560
  assert set(few['test']) <= set(half['test'])


def test_accents_in_either_spelling_have_one_place():
  composed, decomposed = 'caf\u00e9.png', 'cafe\u0301.png'
  assert splits._place(composed) == splits._place(decomposed)


@pytest.mark.parametrize('count', [2, 3, 5])
def test_few_pictures_leave_no_split_empty(count):
  for name in 'abcdefgh':
    parts = splits.split(files_of(*many(name, count)))
    assert parts['train']
    assert parts['test']
    assert len(parts['train'] + parts['test']) == count


def test_single_picture_is_in_both_splits_with_a_warning(caplog):
  parts = splits.split(files_of('1.png'))
  assert names(parts['train']) == names(parts['test']) == ['1.png']
  assert '1.png, is used for training and for testing' in caplog.text


@pytest.mark.parametrize('test', ['test', 'Val', 'valid', 'VALIDATION', 'dev'])
def test_folders_of_splits_are_found_in_any_case(test):
  parts = splits.split(files_of(*many('Train'), *many(f'{test}/deep', 3)))
  assert names(parts['train']) == many('Train')
  assert names(parts['test']) == many(f'{test}/deep', 3)


def test_val_beside_test_is_unused_with_a_word(caplog):
  with caplog.at_level(logging.INFO, logger='absl'):
    parts = splits.split(files_of(*many('train'), *many('test', 2), *many('val'), *many('dev')))
  assert names(parts['test']) == many('test', 2)
  assert "Testing uses the folder 'test'; not used: val, dev." in caplog.text


@pytest.mark.parametrize(
  ('others', 'message'),
  [
    (['train/1.png', 'extra/1.png', 'more/1.png'], "outside 'train', in 'extra', 'more'"),
    (['train/1.png', 'test/1.png', 'extra/1.png'], "outside 'train', in 'extra'"),
    (['train/1.png', 'loose.png'], "outside 'train', in the folder itself"),
    (['test/1.png', 'cats/1.png'], "has a folder 'test' but none named 'train'"),
    (['Val/1.png'], "has a folder 'Val' but none named 'train'"),
  ],
)
def test_unclear_splits_are_refused_in_a_sentence_naming_the_folders(others, message):
  with pytest.raises(UserError, match=message) as error:
    splits.split(files_of(*others))
  assert '\n' not in str(error.value)


def test_a_list_names_the_test_pictures(tmp_path):
  path = tmp_path / 'test.txt'
  path.write_text('# ours\na/003.png\n\na/007.png\n')
  parts = splits.split(files_of(*many('a')), test_list=str(path))
  assert names(parts['test']) == ['a/003.png', 'a/007.png']
  assert len(parts['train']) == 18
  path.write_text('a/003.png\nb/1.png\n')
  with pytest.raises(UserError, match="names 'b/1.png', which is not among the 20 pictures"):
    splits.split(files_of(*many('a')), test_list=str(path))
  with pytest.raises(UserError, match='cannot be read .No such file'):
    splits.split(files_of(*many('a')), test_list=str(tmp_path / 'nowhere'))


@pytest.mark.parametrize('fraction', [0, 1, -0.1, 1.5])
def test_fraction_out_of_range_is_refused(fraction):
  with pytest.raises(UserError, match=f'data.test_fraction={fraction} must be between 0 and 1'):
    splits.split(files_of(*many('a')), test_fraction=fraction)


# --- classes ---


def test_sub_folders_are_classes_in_both_splits():
  parts = splits.split(files_of(*many('train/dog', 3), *many('train/cat', 2), *many('test/dog', 2)))
  found, labels = splits.classes(parts)
  assert found == ['cat', 'dog']
  assert [labels[file] for file in parts['train']] == [1, 1, 1, 0, 0]
  assert [labels[file] for file in parts['test']] == [1, 1]
  parts = splits.split(files_of(*many('dog', 30), *many('cat/deep', 30)))
  found, labels = splits.classes(parts)
  assert found == ['cat', 'dog']
  assert all(labels[f] == (f.name[0] == 'd') for part in parts.values() for f in part)


def test_one_picture_outside_the_folders_means_no_classes(caplog):
  with caplog.at_level(logging.INFO, logger='absl'):
    found, labels = splits.classes(splits.split(files_of(*many('dog'), 'loose.png')))
  assert found == []
  assert set(labels.values()) == {0}
  assert 'There are no classes, since some pictures are in no sub-folder.' in caplog.text


def test_labels_of_the_store_come_before_folders():
  files = [File(f'x/{i}.png', 1, 1, label=i % 3) for i in range(30)]
  found, labels = splits.classes(splits.split(files))
  assert found == ['0', '1', '2']
  assert labels[files[4]] == 1
