"""Files that a fuzzer found or that were made by hand: each is read or refused by the rules."""

import contextlib
import io
import json
import mmap
import os
import pathlib
import struct
import tarfile
import time
import zipfile

import pytest

import score_sde
from faults import targets
from runtime.errors import UserError
from sources import lmdb_file, lsun, published, stores
from sources.base import DATASETS
from tests import published_files as files
from tests import tiny_config

FILES = sorted(targets.CORPUS.glob('*/*'))


def test_corpus_is_small_and_has_a_file_that_each_target_reads(tmp_path):
  assert sum(path.stat().st_size for path in FILES) < 100_000
  assert {path.parent.name for path in FILES} == targets.TARGETS.keys()


@pytest.mark.parametrize('target', targets.TARGETS)
def test_files_are_read_or_refused_by_the_rules(target, tmp_path):
  found = {}
  for path in FILES:
    if path.parent.name == target:
      found[path.name] = targets.check(target, path.read_bytes(), tmp_path / 'file')
  forms = len(targets.TARGETS[target].forms)
  read = {name for name, refusals in found.items() if len(refusals) < forms}
  assert read or target == 'torch'  # which has no checkpoint of so small a network
  assert not list(tmp_path.iterdir())


# Names in files never lead out of a folder.

PNG = targets.png()
OUTSIDE = ('../escaped.png', '/tmp/escaped.png', 'a/../../escaped.png', 'C:\\escaped.png', '..')


@pytest.fixture
def watched(tmp_path):
  """A folder, beside which nothing may appear."""
  (tmp_path / 'secret.png').write_bytes(PNG)
  folder = tmp_path / 'inside'
  folder.mkdir()
  yield folder
  assert {path.name for path in tmp_path.iterdir()} == {'secret.png', 'inside'}
  assert not pathlib.Path('/tmp/escaped.png').exists()


def build(folder, dataset, split='train', **settings):
  config = files.data_config(folder, dataset, 8, num_workers=1, **settings)
  return DATASETS.build(dataset, config.data, config, split)


def test_members_of_a_picture_archive_are_only_names(watched):
  with zipfile.ZipFile(watched / 'a.zip', 'w') as archive:
    for name in OUTSIDE:
      archive.writestr(name, PNG)
    link = zipfile.ZipInfo('link.png')
    link.external_attr = 0o120777 << 16
    archive.writestr(link, '../secret.png')
    labels = [[name, 0] for name in (*OUTSIDE, 'link.png', '../secret.png')]
    archive.writestr('dataset.json', json.dumps({'labels': labels}))
  store = stores.open_store(watched / 'a.zip')
  assert store.read(stores.File('link.png')) == b'../secret.png'  # no link
  source = build(watched, 'ImageFolder', path=str(watched / 'a.zip'), max_bad=9)
  assert len(source) > 0


def test_labels_name_no_file_outside_of_the_folder(watched):
  (watched / 'a.png').write_bytes(PNG)
  labels = [['a.png', 0], ['../secret.png', 1], ['/etc/passwd', 2]]
  (watched / 'dataset.json').write_text(json.dumps({'labels': labels}))
  assert [file.name for file in stores.FolderStore(watched).files()] == ['a.png']


def test_members_and_links_of_a_tar_archive_write_nothing_and_are_not_followed(
  watched, monkeypatch
):
  path = watched / 'cifar-10-binary.tar.gz'
  with tarfile.open(path, 'w:gz') as archive:
    for name in ('../../escaped', '/tmp/escaped.png'):
      archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
      link = tarfile.TarInfo('cifar-10-batches-bin/test_batch.bin')
      link.type, link.linkname = kind, str(watched.parent / 'secret.png')
      archive.addfile(link)
  files.publish(monkeypatch, path)
  with pytest.raises(UserError, match='has no file test_batch.bin'):
    build(watched, 'CIFAR10', 'test')


def test_a_sparse_member_which_may_have_any_size_is_not_read(watched, monkeypatch):
  path = watched / 'cifar-10-binary.tar.gz'
  with tarfile.open(path, 'w:gz', format=tarfile.PAX_FORMAT) as archive:
    member = tarfile.TarInfo('cifar-10-batches-bin/test_batch.bin')
    member.pax_headers = {'GNU.sparse.size': str(2**45), 'GNU.sparse.map': '0,0'}
    archive.addfile(member, io.BytesIO())
  with tarfile.open(path) as archive:
    assert archive.next().size == 2**45
  files.publish(monkeypatch, path)
  with pytest.raises(UserError, match='has no file test_batch.bin'):
    build(watched, 'CIFAR10', 'test')


def test_extraction_of_lsun_writes_the_database_only(watched):
  name = 'church_outdoor_val_lmdb'
  with zipfile.ZipFile(watched / f'{name}.zip', 'w') as archive:
    for other in (*OUTSIDE, f'{name}/../../escaped', f'{name}/lock.mdb'):
      archive.writestr(other, b'1')
    archive.writestr(f'{name}/data.mdb', b'2')
  lsun.extract(watched / f'{name}.zip', watched / 'cache' / name)
  found = {str(path.relative_to(watched)) for path in watched.rglob('*') if path.is_file()}
  assert found == {f'{name}.zip', f'cache/{name}/data.mdb'}


def test_a_database_packed_by_a_method_without_bounds_is_refused(watched):
  name = 'church_outdoor_val_lmdb'
  with zipfile.ZipFile(watched / f'{name}.zip', 'w', zipfile.ZIP_BZIP2) as archive:
    archive.writestr(f'{name}/data.mdb', bytes(10**6))
  with pytest.raises(UserError, match='packed by a method that may need any memory'):
    lsun.extract(watched / f'{name}.zip', watched / 'cache' / name)


def test_labels_of_an_archive_are_bounded_by_its_files(watched):
  with zipfile.ZipFile(watched / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('dataset.json', '{"labels":[' + '[],' * 10**6 + '[]]}')
  with pytest.raises(UserError, match='has 3,000,015 bytes, too many for 1 files'):
    stores.open_store(watched / 'a.zip').files()


def test_nodes_of_a_database_that_overlap_are_refused():
  size, count = 4096, 100
  node = 16 + 2 * count
  leaf = struct.pack('<10x2H2x', 2, node) + struct.pack('<H', node) * count
  leaf += struct.pack('<4H', 0, 0, 0, size - node - 8) + bytes(size - node - 8)
  content = b''
  for number in range(2):
    meta = struct.pack('<2I16xI44x4xHH24xQQQQ', 0xBEEFC0DE, 1, size, 0, 1, 0, 2, 2, number)
    content += (struct.pack('<10x2H2x', 8, 0) + meta).ljust(size, b'\0')
  with mmap.mmap(-1, 3 * size) as file:
    file.write(content + leaf)
    with pytest.raises(lmdb_file.DamagedDatabase, match='nodes that overlap'):
      list(lmdb_file.entries(file))


@pytest.mark.parametrize('category', ['../../escaped', '/tmp/escaped', 'a/b', '..', 'a\0b', 'a\n'])
def test_category_that_is_a_path_is_refused(category, watched):
  with pytest.raises(UserError, match='is no name of a category') as error:
    build(watched, 'LSUN', category=category)
  assert '\n' not in str(error.value)


def test_recorded_paths_are_not_opened_when_a_run_is(watched):
  config = score_sde.load_config(tiny_config.get_config())
  with config.unlocked():
    config.data.path = '../secret.png'
    config.data.cache_dir = '../escaped'
    config.eval.stats_path = '../../escaped.npz'
  (watched / 'config.json').write_text(config.to_json())
  before = os.stat(watched.parent / 'secret.png')
  assert score_sde.load_config(watched).data.path == '../secret.png'
  with pytest.raises(UserError, match='holds no checkpoint'):
    score_sde.load(watched)
  after = os.stat(watched.parent / 'secret.png')
  assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


def test_published_names_are_plain():
  assert all(pathlib.PurePath(name).name == name for name in published.FILES)


@pytest.mark.parametrize(('slow', 'found'), [((1, 0, 1), False), ((1, 1, 1), True)])
def test_a_file_is_too_slow_only_if_it_is_each_time(slow, found, tmp_path, monkeypatch):
  monkeypatch.setattr(targets, 'SECONDS', 0.3)
  turns = iter(slow)

  def read(path):
    end = time.process_time() + 0.5 * next(turns)
    while time.process_time() < end:
      pass

  (tmp_path / 'file').touch()
  finding = pytest.raises(targets.Finding, match=' s$') if found else contextlib.nullcontext()
  with finding:
    targets._check_file(targets.Target(read, 'file'), tmp_path / 'file')
