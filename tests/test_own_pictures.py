"""Own pictures from every kind of store, through the cache: pixels, faults, kills, changes."""

import csv
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

import datasets
from configs.vp import pictures_ddpmpp_continuous
from modes.preparation import prepare
from runtime.errors import Exit, UserError
from sources import cache, shards
from sources.array_pictures import ArrayPictures
from sources.framing import Framing
from tests.processes import ROOT

COUNT = 40
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), np.uint8)
LABELS = [i % 2 for i in range(COUNT)]
NAMES = [f'{("cat", "dog")[label]}/{i:02d}.png' for i, label in enumerate(LABELS)]


def encoded(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'png')
  return file.getvalue()


def as_folder(path):
  for name, pixels in zip(NAMES, PIXELS, strict=True):
    target = path / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(encoded(pixels))
  return path


def as_zip(path):
  with zipfile.ZipFile(path / 'x.zip', 'w') as archive:
    for name, pixels in zip(NAMES, PIXELS, strict=True):
      archive.writestr(name, encoded(pixels))
    labels = [[name, label] for name, label in zip(NAMES, LABELS, strict=True)]
    archive.writestr('dataset.json', json.dumps({'labels': labels}))
  return path / 'x.zip'


def as_npz(path):
  np.savez(path / 'x.npz', images=PIXELS, labels=np.asarray(LABELS))
  return path / 'x.npz'


def table(rows, struct=True):
  import pyarrow

  content = [encoded(PIXELS[i]) for i in rows]
  images = [{'bytes': c, 'path': None} for c in content] if struct else content
  features = {'label': {'names': ['cat', 'dog'], '_type': 'ClassLabel'}}
  metadata = {b'huggingface': json.dumps({'info': {'features': features}})}
  columns = {'image': images, 'label': [LABELS[i] for i in rows]}
  return pyarrow.table(columns).replace_schema_metadata(metadata)


def as_parquet(path):
  import pyarrow.parquet

  for shard, rows in enumerate((range(25), range(25, COUNT))):
    file = path / f'part-{shard}.parquet'
    pyarrow.parquet.write_table(table(rows), file, row_group_size=8)
  return path


def as_arrow_stream(path):
  import pyarrow

  whole = table(range(COUNT), struct=False)
  target = pyarrow.OSFile(str(path / 'x.arrow'), 'wb')
  with target as sink, pyarrow.ipc.new_stream(sink, whole.schema) as writer:
    writer.write_table(whole, max_chunksize=7)
  return path / 'x.arrow'


def as_arrow_file(path):
  import pyarrow

  whole = table(range(COUNT))
  target = pyarrow.OSFile(str(path / 'x.arrow'), 'wb')
  with target as sink, pyarrow.ipc.new_file(sink, whole.schema) as writer:
    writer.write_table(whole, max_chunksize=7)
  return path / 'x.arrow'


@pytest.fixture
def config(tmp_path):
  config = pictures_ddpmpp_continuous.get_config('laptop')
  config.data.cache_dir = str(tmp_path / 'cache')
  config.training.batch_size = config.eval.batch_size = 4
  return config


def sources_of(config, path, **data):
  config.data.path = str(path)
  with config.data.unlocked():
    config.data.update(data)
  prepared = prepare(config)
  return tuple(datasets.get_source(prepared, split) for split in ('train', 'test'))


def by_content(*sources):
  """Label by pixels, of all examples."""
  examples = [source[i] for source in sources for i in range(len(source))]
  return {example['image'].tobytes(): int(example['label']) for example in examples}


EXPECTED = {pixels.tobytes(): label for pixels, label in zip(PIXELS, LABELS, strict=True)}
KINDS = [as_folder, as_zip, as_npz, as_parquet, as_arrow_stream, as_arrow_file]


@pytest.mark.parametrize('kind', KINDS)
def test_every_store_gives_the_pixels_and_labels_that_were_stored(kind, config, tmp_path):
  where = tmp_path / 'data'
  where.mkdir()
  train, test = sources_of(config, kind(where))
  assert by_content(train, test) == EXPECTED
  assert len(train) + len(test) == COUNT
  assert 0 < len(test) < 12
  names = ('0', '1') if kind in (as_zip, as_npz) else ('cat', 'dog')
  assert train.class_names == test.class_names == names


def test_parquet_files_of_splits_are_split_so(config, tmp_path):
  import pyarrow.parquet

  for name, rows in (('train-00000-of-00002', range(20)), ('train-00001-of-00002', range(20, 30))):
    pyarrow.parquet.write_table(table(rows), tmp_path / f'{name}.parquet')
  pyarrow.parquet.write_table(table(range(30, COUNT)), tmp_path / 'test-00000-of-00001.parquet')
  train, test = sources_of(config, tmp_path)
  assert (len(train), len(test)) == (30, 10)
  np.testing.assert_array_equal(test[3]['image'], PIXELS[33])
  assert train.class_names == ('cat', 'dog')


def test_files_that_cannot_be_read_are_refused_with_their_cause(config, tmp_path):
  import pyarrow.parquet

  def refused(path, message):
    with pytest.raises(UserError, match=message) as error:
      sources_of(config, path)
    assert '\n' not in str(error.value)
    assert f'data.path={str(path)!r}' in str(error.value)

  whole = as_zip(tmp_path).read_bytes()
  (tmp_path / 'x.zip').write_bytes(whole[:-1000])
  refused(tmp_path / 'x.zip', 'it is not a complete ZIP file')
  pyarrow.parquet.write_table(table(range(4)), tmp_path / 'x.parquet')
  whole = (tmp_path / 'x.parquet').read_bytes()
  (tmp_path / 'x.parquet').write_bytes(whole[:-10])
  refused(tmp_path / 'x.parquet', 'its file x.parquet is damaged')
  pyarrow.parquet.write_table(pyarrow.table({'a': [1]}), tmp_path / 'y.parquet')
  refused(tmp_path / 'y.parquet', 'y.parquet')
  (tmp_path / 'z.npz').write_bytes(b'PK')
  refused(tmp_path / 'z.npz', 'it cannot be used')
  np.savez(tmp_path / 'f.npz', images=np.zeros((2, 8, 8, 3), np.float32))
  refused(tmp_path / 'f.npz', 'its images have type float32.* for floats in .0, 1. 255 times')
  np.savez(tmp_path / 'l.npz', images=PIXELS, labels=np.zeros(3, int))
  refused(tmp_path / 'l.npz', 'its labels have type int64 and shape')
  (tmp_path / 'none').mkdir()
  refused(tmp_path / 'none', 'it holds no picture that can be read')
  with pytest.raises(UserError, match="in data.path='': it is empty: give a folder"):
    sources_of(config, '')


def test_number_of_classes_may_be_stated(config, tmp_path):
  folder = as_folder(tmp_path / 'data')
  assert sources_of(config, folder, num_classes=2)[0].class_names == ('cat', 'dog')
  with pytest.raises(UserError, match='data.num_classes=3, but it has 2 classes: set'):
    sources_of(config, folder, num_classes=3)


@pytest.mark.parametrize('name', ['FFHQ', 'CelebAHQ'])
@pytest.mark.parametrize('kind', [as_folder, as_zip])
def test_faces_are_read_from_pictures_too(name, kind, config, tmp_path):
  (tmp_path / 'data').mkdir()
  config.data.dataset = name
  assert by_content(*sources_of(config, kind(tmp_path / 'data'))) == EXPECTED


# --- faults ---


def test_bad_pictures_are_skipped_counted_and_listed(config, tmp_path, caplog):
  folder = as_folder(tmp_path / 'data')
  (folder / 'cat' / '00.png').write_bytes(b'a text')
  (folder / 'dog' / '01.png').write_bytes(encoded(PIXELS[1])[:500])
  (folder / 'dog' / '03.png').write_bytes(encoded(np.zeros((3, 4), np.uint8)))
  (folder / 'dog' / '05.png').write_bytes(b'')
  (folder / 'dog' / '._07.png').write_bytes(b'x')
  train, test = sources_of(config, folder)
  rest = {i for i in range(COUNT) if i not in (0, 1, 3, 5)}
  assert by_content(train, test) == {PIXELS[i].tobytes(): LABELS[i] for i in rest}
  listed = {}
  for source in (train, test):
    with (source.folder / 'skipped.csv').open(encoding='utf-8') as file:
      listed |= {row['file']: row['reason'] for row in csv.DictReader(file)}
    assert source.num_skipped >= 2  # the hidden and the empty file, in either split
  assert listed.pop('dog/01.png')
  assert listed == {
    'cat/00.png': 'not a picture',
    'dog/03.png': 'smaller than 32 pixels',
    'dog/05.png': 'empty file',
    'dog/._07.png': 'hidden file',
  }
  assert 'Not all pictures are used' in caplog.text


def test_too_many_bad_pictures_are_an_error_and_hidden_ones_do_not_count(config, tmp_path):
  folder = as_folder(tmp_path / 'data')
  for i in range(3):
    (folder / 'cat' / f'bad{i}.png').write_bytes(b'a text')
  for i in range(10):
    (folder / 'cat' / f'._{i}.png').write_bytes(b'x')
  with pytest.raises(
    UserError, match='pictures of ImageFolder/.* cannot be used, more than data.max_bad=0 .*cat/bad'
  ):
    sources_of(config, folder, max_bad=0)
  assert by_content(*sources_of(config, folder, max_bad=3)) == EXPECTED
  # The cache that was made remembers them.
  with pytest.raises(
    UserError, match='cannot be used, more than data.max_bad=0 .*skipped.csv lists'
  ):
    sources_of(config, folder, max_bad=0)


def test_a_folder_of_bad_pictures_is_refused(config, tmp_path):
  for i in range(7):
    (tmp_path / f'{i}.jpg').write_bytes(b'<html>')
  with pytest.raises(
    UserError, match=r'None of the \d pictures of ImageFolder/train can be used .*not a picture \('
  ):
    sources_of(config, tmp_path)


def test_name_that_is_not_ascii_is_read(config, tmp_path):
  folder = as_folder(tmp_path / 'Bilder über Äpfel')
  (folder / 'cat' / '00.png').rename(folder / 'cat' / '猫 née.png')
  assert by_content(*sources_of(config, folder)) == EXPECTED


# --- the cache ---


def content(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix}


def test_second_start_reads_the_cache_and_not_the_pictures(config, tmp_path, monkeypatch):
  folder = as_folder(tmp_path / 'data')
  train, _ = sources_of(config, folder)
  monkeypatch.setattr('sources.pictures.decode', None)
  again, _ = sources_of(config, folder)
  assert again.fingerprint == train.fingerprint
  assert again.folder == train.folder


def test_a_changed_picture_of_the_same_name_and_size_is_noticed(config, tmp_path):
  folder = as_folder(tmp_path / 'data')
  first = sources_of(config, folder)
  path = folder / 'cat' / '04.png'
  status = path.stat()
  changed = bytearray(path.read_bytes())
  path.write_bytes(encoded(PIXELS[4][::-1]))
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  second = sources_of(config, folder)
  assert {s.fingerprint for s in first} != {s.fingerprint for s in second}
  path.write_bytes(changed)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 2))
  third = sources_of(config, folder)
  assert [s.fingerprint for s in third] == [s.fingerprint for s in first]  # of the content


@pytest.mark.parametrize(
  'change', [{'image_size': 16}, {'crop': 'none'}, {'resize': 'box'}, {'background': 'black'}]
)
def test_other_preprocessing_has_another_cache(change, config, tmp_path):
  folder = as_folder(tmp_path / 'data')
  first, _ = sources_of(config, folder)
  second, _ = sources_of(config, folder, **change)
  assert first.folder != second.folder


def test_damaged_cache_is_named(config, tmp_path):
  folder = as_folder(tmp_path / 'data')
  train, _ = sources_of(config, folder)
  shard = train.folder / 'shard_00003.bin'
  damaged = bytearray(shard.read_bytes())
  damaged[100] ^= 1
  for wrong in (damaged, damaged[:-1], b''):
    shard.write_bytes(wrong)
    train, _ = sources_of(config, folder)
    with pytest.raises(UserError, match=f'{shard} is damaged: remove the folder {train.folder}'):
      train.verify()
  (train.folder / 'index.npz').write_bytes(b'PK')
  with pytest.raises(UserError, match='index.npz is damaged: remove the folder'):
    sources_of(config, folder)


def test_interrupted_build_continues_and_ends_in_the_same_bytes(config, tmp_path):
  folder = as_folder(tmp_path / 'data')
  train, _ = sources_of(config, folder)
  whole = content(train.folder)
  (train.folder / 'index.npz').unlink()
  for name in ('shard_00002.json', 'shard_00005.bin', 'shard_00005.json'):
    (train.folder / name).unlink()
  (train.folder / '.shard_00007.bin-a1b2c3d4').write_bytes(b'a part')
  kept = train.folder / 'shard_00001.bin'
  before = kept.stat().st_mtime_ns
  again, _ = sources_of(config, folder)
  assert content(again.folder) == whole
  assert kept.stat().st_mtime_ns == before
  assert not list(again.folder.glob('.shard*'))


BUILD = """
import sys, time
sys.path.insert(0, {root!r})
from configs.vp import pictures_ddpmpp_continuous
from modes.preparation import prepare
import datasets
from sources import pictures
decode = pictures.decode
def slowly(*args):
  time.sleep({delay})
  return decode(*args)
pictures.decode = slowly
config = pictures_ddpmpp_continuous.get_config('laptop')
config.data.cache_dir, config.data.path = {cache!r}, {path!r}
datasets.get_source(prepare(config), 'train')
"""


def build(config, path, delay):
  code = BUILD.format(root=str(ROOT), delay=delay, cache=config.data.cache_dir, path=str(path))
  return subprocess.Popen([sys.executable, '-c', code])


def test_killed_build_continues(config, tmp_path):
  folder = as_folder(tmp_path / 'data')
  process = build(config, folder, 0.1)
  shards = lambda: list(pathlib.Path(config.data.cache_dir).glob('*/shard_*.json'))
  while len(shards()) < 3:
    assert process.poll() is None
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert len(shards()) < 14
  killed, _ = sources_of(config, folder)
  files = content(killed.folder)
  shutil.rmtree(config.data.cache_dir)
  fresh, _ = sources_of(config, folder)
  assert content(fresh.folder) == files


LEAVE_A_LOCK = """
import os, pathlib, signal, sys
import loky, numpy as np
from sources import shards
from sources.array_pictures import ArrayPictures
from sources.framing import Framing
executors = []
class Executor(loky.ProcessPoolExecutor):
  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    executors.append(self)
loky.ProcessPoolExecutor = Executor
if __name__ == '__main__':
  shards.MANY = 1
  found = ArrayPictures(np.zeros((40, 4, 4, 1), np.uint8), np.zeros(40, np.int64), key='zeros')
  object.__setattr__(found, 'portable', True)
  maker = shards.ShardMaker(pathlib.Path(sys.argv[1]), found, Framing(4, min_side=4), 40, 1)
  with shards.working(maker, 2) as make:
    next(make(range(40)))
    executors[0]._processes_management_lock.acquire()  # as while it starts workers
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_the_one_that_started_them_whatever_locks_it_held(tmp_path):
  process = subprocess.Popen(
    [sys.executable, '-c', LEAVE_A_LOCK, tmp_path], cwd=ROOT, stdout=subprocess.PIPE
  )
  process.communicate(timeout=60)  # until no process has the pipe
  assert process.returncode == -signal.SIGKILL


def test_processes_that_build_one_cache_at_once_share_the_work(config, tmp_path):
  folder = as_folder(tmp_path / 'data')
  processes = [build(config, folder, 0.02) for _ in range(2)]
  assert [process.wait(timeout=120) for process in processes] == [0, 0]
  assert by_content(*sources_of(config, folder)) == EXPECTED


def test_threads_give_the_cache_of_one(config, tmp_path):
  folder = as_folder(tmp_path / 'data')
  found = []
  for threads in (1, 2, 4):
    config.data.cache_dir = str(tmp_path / f'cache{threads}')
    train, _ = sources_of(config, folder, num_workers=threads)
    found.append(content(train.folder))
  assert found[0] == found[1] == found[2]


@pytest.mark.parametrize('kind', [as_folder, as_zip, as_parquet, as_arrow_stream])
def test_processes_give_the_cache_of_threads(kind, config, tmp_path, monkeypatch):
  (tmp_path / 'data').mkdir()
  path = kind(tmp_path / 'data')
  train, _ = sources_of(config, path)
  files = content(train.folder)
  monkeypatch.setattr('sources.shards.MANY', 1)
  config.data.cache_dir = str(tmp_path / 'other')
  again, _ = sources_of(config, path, num_workers=2)
  assert content(again.folder) == files
  config.data.cache_dir = str(tmp_path / 'third')
  if kind is as_folder:
    (path / 'cat' / 'bad.png').write_bytes(b'a text')
    with pytest.raises(UserError, match='more than data.max_bad=0'):
      sources_of(config, path, max_bad=0)


class SlowPictures(ArrayPictures):
  """Pictures that processes read slowly enough for some to be left when one fails."""

  portable = True

  def read(self, i):
    time.sleep(0.02)
    return super().read(i)


def test_a_failure_while_processes_work_logs_no_traceback(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr('sources.shards.MANY', 1)
  found = SlowPictures(np.zeros((40, 4, 4, 1), np.uint8), np.zeros(40, np.int64), key='slow')

  def fail_at(number, folder):
    folder.mkdir()
    maker = shards.ShardMaker(folder, found, Framing(4, min_side=4), count=40, step=1)
    with shards.working(maker, 2) as make:
      for i, shard in enumerate(make(range(40))):
        assert shard.shapes == [(4, 4)]
        if i == number:
          raise KeyError

  for number in range(4):
    with pytest.raises(KeyError):
      fail_at(number, tmp_path / str(number))
  assert not caplog.records


class DeadlyPictures(ArrayPictures):
  """Pictures whose reader is killed."""

  portable = True

  def read(self, i):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_the_system_kills_is_told_in_a_sentence(tmp_path, monkeypatch):
  monkeypatch.setattr('sources.shards.MANY', 1)
  found = DeadlyPictures(np.zeros((9, 4, 4, 1), np.uint8), np.zeros(9, np.int64), key='deadly')
  maker = shards.ShardMaker(tmp_path, found, Framing(4, min_side=4), count=9, step=1)
  with (
    pytest.raises(UserError, match='lower data.num_workers=2 and rerun') as error,
    shards.working(maker, 2) as make,
  ):
    list(make(range(9)))
  assert error.value.status == Exit.MEMORY


def test_file_system_without_locks_is_a_warning(config, tmp_path, monkeypatch, caplog):
  def flock(file, operation):
    raise OSError(37, 'No locks available')

  monkeypatch.setattr('fcntl.flock', flock)
  assert by_content(*sources_of(config, as_folder(tmp_path / 'data'))) == EXPECTED
  assert 'cannot be locked (No locks available): let only one run use it' in caplog.text


def test_cache_that_cannot_be_written_to_is_named(config, tmp_path):
  (tmp_path / 'file').touch()
  config.data.cache_dir = str(tmp_path / 'file')
  with pytest.raises(
    UserError, match='^data.cache_dir: nothing can be written to .*choose another'
  ):
    sources_of(config, as_folder(tmp_path / 'data'))


def test_random_crops_move_along_the_longer_side_by_the_draws_alone(config, tmp_path):
  ramp = np.broadcast_to(np.arange(96, dtype=np.uint8), (32, 96))
  folder = tmp_path / 'wide'
  folder.mkdir()
  for i in range(4):
    Image.fromarray(ramp if i % 2 else ramp.T).save(folder / f'{i}.png')
  config.data.num_channels = 1
  train, test = sources_of(config, folder, crop='random')
  numbers = np.zeros(5, int)
  draws = np.asarray([0, 0.25, 0.5, 0.75, 0.999])
  for source in (train, test):
    images = source.gather(numbers, draws)['image'][..., 0]
    starts = images[:, 0, 0]
    assert starts.tolist() == [0, 16, 32, 48, 64]
    np.testing.assert_array_equal(images, source.gather(numbers, draws)['image'][..., 0])
    assert source[0]['image'][0, 0] == 32  # the middle
  config.training.batch_size = 1
  dataset, _, _ = datasets.get_dataset(prepare(config))
  assert len({int(dataset.batch(step)['image'][0, 0, 0, 0]) for step in range(40)}) > 10


def test_threads_read_one_cache(config, tmp_path):
  train, test = sources_of(config, as_folder(tmp_path / 'data'))
  results = []

  def read():
    results.append(by_content(train, test) == EXPECTED)

  threads = [threading.Thread(target=read) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert results == [True] * 4


def test_default_folder_is_in_the_cache_of_the_user(config, monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  config.data.cache_dir = ''
  assert cache.cache_folder(config.data) == tmp_path / 'score_sde' / 'data'
