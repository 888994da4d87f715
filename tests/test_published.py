"""Data sets from their authors' files: pixels, and what is said of files that are not right."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

import datasets
from modes import prepare_data
from runtime.errors import UserError
from sources import lsun, published, tensorflow_datasets
from sources.base import DATASETS
from tests import published_files as files
from tests.processes import ROOT


def build(config, split):
  return DATASETS.build(config.data.dataset, config.data, config, split)


def images_of(source):
  return source.gather(np.arange(len(source)))['image']


def expected_cifar(split):
  seeds = range(1, 6) if split == 'train' else [6]
  batches = [files.cifar_levels(4 if seed < 6 else 3, seed) for seed in seeds]
  levels, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
  return levels.transpose(0, 2, 3, 1), labels


# An independent statement of the paper's preprocessing.


def triangle(x):
  return np.maximum(1 - abs(x), 0)


def keys_cubic(x):
  x = abs(x)
  near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resized(image, size, kernel):
  """Each new pixel is a weighted mean, with the kernel as wide as the pixel is in the image."""
  for _ in range(2):
    count = len(image)
    scale = count / size
    centres = (np.arange(size) + 0.5) * scale - 0.5
    weights = kernel((np.arange(count) - centres[:, None]) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    # The two passes are one after the other, and each is rounded, as in image libraries.
    image = np.clip(np.rint(np.tensordot(weights, image, 1)), 0, 255).swapaxes(0, 1)
  return image


def centre(image, side):
  top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
  return image[top : top + side, left : left + side]


def assert_one_level(actual, expected):
  # Rounding of the weights to fixed point, and of the sums.
  np.testing.assert_allclose(actual.astype(float), expected, atol=1)


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('form', ['binary', 'python', 'binary folder', 'python folder'])
def test_cifar10_is_read_in_all_its_forms(form, split, tmp_path, monkeypatch):
  kind = form.split()[0]
  path = getattr(files, f'cifar_{kind}_archive')(tmp_path)
  files.publish(monkeypatch, path)
  config = files.data_config(tmp_path, 'CIFAR10', 32, path=str(path))
  if 'folder' in form:
    with tarfile.open(path) as archive:
      archive.extractall(tmp_path, filter='data')
    path.unlink()
    config.data.path = str(next(tmp_path.glob('cifar-10-batches-*')))
  source = build(config, split)
  images, labels = expected_cifar(split)
  batch = source.gather(np.arange(len(source)))
  np.testing.assert_array_equal(batch['image'], images)
  np.testing.assert_array_equal(batch['label'], labels)
  assert source.class_names[6] == 'frog'


def test_complete_cache_needs_no_archive(tmp_path, monkeypatch):
  path = files.cifar_python_archive(tmp_path)
  files.publish(monkeypatch, path)
  config = files.data_config(tmp_path, 'CIFAR10', 32)
  before = build(config, 'train').fingerprint
  path.unlink()
  assert build(config, 'train').fingerprint == before
  with pytest.raises(published.NotFetched, match=r'cifar-10-binary.tar.gz of CIFAR10 is not in .*'):
    build(config, 'test')


def test_pickle_that_calls_a_function_is_refused_and_runs_nothing(tmp_path, monkeypatch):
  ran = tmp_path / 'ran'
  program = f"cos\nsystem\n(S'touch {ran}'\ntR.".encode()
  path = files.cifar_python_archive(tmp_path, data_batch_3=program)
  files.publish(monkeypatch, path)
  config = files.data_config(tmp_path, 'CIFAR10', 32)
  with pytest.raises(
    UserError, match=r'data_batch_3 is not a batch .*the Python object os.system.*was run: get'
  ):
    build(config, 'train')
  assert not ran.exists()


@pytest.mark.parametrize(
  ('content', 'cause'),
  [
    (b'\x00' * 3072, '3,072 bytes are not a whole number of records of 3,073'),
    (b'', '0 bytes'),
    (b'\x0a' * 3073, 'a label 10, not in 0 to 9'),
  ],
)
def test_wrong_batch_is_named(content, cause, tmp_path):
  for name, good in files.cifar_members(files.cifar_binary, '.bin').items():
    path = tmp_path / 'cifar-10-batches-bin' / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if name == 'data_batch_2.bin' else good)
  with pytest.raises(UserError, match=f'data_batch_2.bin is not a batch of CIFAR-10 .*{cause}'):
    build(files.data_config(tmp_path, 'CIFAR10', 32), 'train')


def test_svhn_is_read(tmp_path, monkeypatch):
  config = files.data_config(tmp_path, 'SVHN', 32)
  for seed, split in enumerate(('train', 'test')):
    path = tmp_path / f'{split}_32x32.mat'
    images, labels = files.svhn_file(path, seed=seed)
    files.publish(monkeypatch, path)
    batch = build(config, split).gather(np.arange(7))
    np.testing.assert_array_equal(batch['image'], images.transpose(3, 0, 1, 2))
    assert batch['label'][0] == 0
    np.testing.assert_array_equal(batch['label'][1:], labels[1:, 0])


@pytest.mark.parametrize('form', ['zip', 'folder'])
def test_celeba_is_framed_as_in_the_paper(form, tmp_path, monkeypatch):
  pictures = files.celeba(tmp_path)
  for name in ('img_align_celeba.zip', 'list_eval_partition.txt'):
    files.publish(monkeypatch, tmp_path / name)
  if form == 'folder':
    with zipfile.ZipFile(tmp_path / 'img_align_celeba.zip') as archive:
      archive.extractall(tmp_path)
    (tmp_path / 'img_align_celeba.zip').unlink()
  config = files.data_config(tmp_path, 'CELEBA', 64)
  for split, numbers in {'train': (1, 4), 'test': (2, 5)}.items():
    source = build(config, split)
    assert len(source) == 2
    for image, number in zip(images_of(source), numbers, strict=True):
      stored = pictures[f'{number:06d}.jpg']
      assert_one_level(image, resized(centre(stored, 140), 64, triangle))


def test_celeba_archive_and_list_must_agree(tmp_path, monkeypatch):
  files.celeba(tmp_path)
  listed = tmp_path / 'list_eval_partition.txt'
  lines = listed.read_text()
  files.publish(monkeypatch, tmp_path / 'img_align_celeba.zip')
  config = files.data_config(tmp_path, 'CELEBA', 64)
  for text, message in (
    (lines + '000099.jpg 0\n', 'has no picture 000099.jpg, which list_eval_partition.txt lists'),
    (lines[:-13], 'has a picture 000006.jpg, which list_eval_partition.txt does not list'),
    (lines.replace(' 2', ' 3', 1), "Line 3 of .* is '000003.jpg 3', not a name and 0, 1 or 2"),
  ):
    listed.write_text(text)
    files.publish(monkeypatch, listed)
    with pytest.raises(UserError, match=message):
      build(config, 'train')


@pytest.fixture
def church(tmp_path):
  """The ZIP files of a category, and the decoded pictures."""
  rng = np.random.default_rng(0)
  shapes = [(256, 300), (341, 256), (257, 256)]
  pictures = {}
  for split in ('train', 'val'):
    made = [files.smooth_picture(*shape, rng.integers(99)) for shape in shapes]
    pictures[split] = files.lsun_zip(tmp_path, f'church_outdoor_{split}_lmdb', made)
  return pictures


@pytest.mark.parametrize('size', [64, 128])
def test_lsun_is_extracted_and_framed_as_in_the_paper(size, church, tmp_path):
  config = files.data_config(tmp_path, 'LSUN', size, category='church_outdoor')
  with pytest.raises(published.NotFetched, match=r'_train_lmdb.zip has to be extracted') as error:
    build(config, 'train')
  error.value.fetch()
  assert not (tmp_path / 'cache' / 'escaped.txt').exists()
  source = build(config, 'train')
  for image, stored in zip(images_of(source), church['train'].values(), strict=True):
    if size != 128:
      expected = resized(centre(stored, min(stored.shape[:2])), size, keys_cubic)
    else:
      shape = [round(n * size / min(stored.shape[:2])) for n in stored.shape[:2]]
      shrunk = Image.fromarray(stored).resize(shape[::-1], Image.Resampling.BILINEAR)
      expected = centre(np.asarray(shrunk), size)
    assert_one_level(image, expected)
  shutil.rmtree(tmp_path / 'cache' / 'downloads' / 'church_outdoor_train_lmdb')
  (tmp_path / 'church_outdoor_train_lmdb.zip').unlink()
  assert build(config, 'train').fingerprint == source.fingerprint


def test_lsun_folder_of_pictures(tmp_path):
  for folder, level in (('train', 10), ('val', 20)):
    (tmp_path / folder).mkdir()
    for i in range(2):
      Image.new('RGB', (80, 70), (level + i,) * 3).save(tmp_path / folder / f'{i}.png')
  config = files.data_config(tmp_path, 'LSUN', 64, category='tower')
  for split, level in (('train', 10), ('test', 20)):
    assert images_of(build(config, split))[:, 0, 0, 0].tolist() == [level, level + 1]


def test_truncated_lmdb_is_refused(church, tmp_path):
  lsun.extract(tmp_path / 'church_outdoor_val_lmdb.zip', tmp_path / 'church_outdoor_val_lmdb')
  path = tmp_path / 'church_outdoor_val_lmdb' / 'data.mdb'
  os.truncate(path, path.stat().st_size - 4096)
  config = files.data_config(tmp_path, 'LSUN', 64, category='church_outdoor')
  with pytest.raises(
    UserError, match=r'data.mdb is truncated, since it has [\d,]+ of [\d,]+ bytes'
  ):
    build(config, 'test')
  os.truncate(path, 100)
  with pytest.raises(
    UserError, match='church_outdoor_val_lmdb is not an LMDB database, or is damaged'
  ):
    build(config, 'test')


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'wrong'])
def test_damaged_lsun_archive_is_refused(damage, church, tmp_path):
  path = tmp_path / 'church_outdoor_val_lmdb.zip'
  harm(path, damage)
  with pytest.raises(
    UserError, match=f'{path} (is truncated or damaged|has no file church_outdoor_val_lmdb/data)'
  ):
    lsun.extract(path, tmp_path / 'church_outdoor_val_lmdb')
  assert not (tmp_path / 'church_outdoor_val_lmdb').exists()


def harm(path, damage):
  content = bytearray(path.read_bytes())
  if damage == 'truncated':
    del content[-len(content) // 3 :]
  elif damage == 'flipped':
    content[len(content) // 2] ^= 1
  else:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
      archive.writestr('readme.txt', 'something else')
    content = file.getvalue() + bytes(len(content))
  path.write_bytes(content)


MAKERS = {
  'cifar-10-binary.tar.gz': ('CIFAR10', files.cifar_binary_archive),
  'cifar-10-python.tar.gz': ('CIFAR10', files.cifar_python_archive),
  'train_32x32.mat': ('SVHN', lambda folder: files.svhn_file(folder / 'train_32x32.mat')),
  'img_align_celeba.zip': ('CELEBA', files.celeba),
}


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'wrong'])
@pytest.mark.parametrize('name', MAKERS)
def test_damaged_archive_is_refused_by_its_size_or_checksum(name, damage, tmp_path, monkeypatch):
  dataset, make = MAKERS[name]
  make(tmp_path)
  path = tmp_path / name
  files.publish(monkeypatch, path)
  if dataset == 'CELEBA':
    files.publish(monkeypatch, tmp_path / 'list_eval_partition.txt')
  known = published.FILES[name].size
  harm(path, damage)
  cause = {'truncated': 'truncated', 'flipped': 'damaged', 'wrong': 'is another file than'}[damage]
  cause = cause if known else 'is incomplete, damaged or another file, since its md5 is'
  with pytest.raises(UserError, match=f'{path} .*{cause}.*: remove it and get it from') as error:
    build(files.data_config(tmp_path, dataset, 32, path=str(path)), 'train')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['cifar-10-binary.tar.gz', 'train_32x32.mat'])
def test_archive_with_the_right_checksum_is_still_read_with_care(name, tmp_path, monkeypatch):
  dataset, make = MAKERS[name]
  make(tmp_path)
  harm(tmp_path / name, 'truncated')
  files.publish(monkeypatch, tmp_path / name)
  with pytest.raises(UserError, match=f'{name} (is truncated or damaged|cannot be read as SVHN)'):
    build(files.data_config(tmp_path, dataset, 32), 'train')


def test_path_of_another_file_is_refused(tmp_path):
  (tmp_path / 'mine.zip').touch()
  config = files.data_config(tmp_path, 'SVHN', 32, path=str(tmp_path / 'mine.zip'))
  with pytest.raises(UserError, match=r"mine.zip' is not a file of SVHN: give train_32x32.mat"):
    build(config, 'train')


# Downloads.


def file_of(server, content, **changes):
  checksum = f'sha256:{hashlib.sha256(content).hexdigest()}'
  facts = {'address': server.address, 'size': len(content), 'checksum': checksum}
  return dataclasses.replace(published.FILES['cifar-10-binary.tar.gz'], **(facts | changes))


CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.mark.parametrize('knows_ranges', [True, False])
@pytest.mark.parametrize('size', [len(CONTENT), None])
def test_interrupted_download_continues(size, knows_ranges, tmp_path):
  server = files.serve(CONTENT, [100_000], knows_ranges)
  file = file_of(server, CONTENT, size=size)
  with pytest.raises(UserError, match='ended after 100,000 of 300,000 bytes.*which continues'):
    published.download(file, tmp_path)
  assert os.listdir(tmp_path) == [f'{file.name}.part']
  path = published.download(file, tmp_path)
  assert path.read_bytes() == CONTENT
  assert server.ranges == [None, 'bytes=100000-']
  assert os.listdir(tmp_path) == [file.name]


def test_download_that_was_complete_is_only_verified(tmp_path):
  server = files.serve(CONTENT)
  file = file_of(server, CONTENT, size=None)
  (tmp_path / f'{file.name}.part').write_bytes(CONTENT)
  assert published.download(file, tmp_path).read_bytes() == CONTENT
  assert server.ranges == ['bytes=300000-']


def test_download_of_another_file_is_refused(tmp_path):
  server = files.serve(CONTENT)
  file = file_of(server, CONTENT[::-1])
  with pytest.raises(UserError, match=f'What {server.address} sent is damaged or another file'):
    published.download(file, tmp_path)
  assert os.listdir(tmp_path) == []


def test_no_network_is_one_sentence(tmp_path):
  server = files.serve(b'')
  server.shutdown()
  server.server_close()
  file = file_of(server, CONTENT)
  with pytest.raises(
    UserError, match=f'{server.address} cannot be downloaded .*refused.*{file.name} .*{tmp_path}'
  ) as error:
    published.download(file, tmp_path)
  assert '\n' not in str(error.value)


def test_prepare_data_downloads_and_training_does_not(tmp_path, monkeypatch):
  made = files.cifar_binary_archive(tmp_path)
  server = files.serve(made.read_bytes())
  files.publish(monkeypatch, made, address=server.address)
  made.unlink()
  config = files.data_config(tmp_path, 'CIFAR10', 32, path='')
  with pytest.raises(UserError, match='run `python main.py --mode=prepare_data` with the same'):
    build(config, 'train')
  assert server.ranges == []
  prepare_data.prepare_data(config)
  assert server.ranges == [None]
  (tmp_path / 'cache' / 'downloads' / made.name).unlink()
  prepare_data.prepare_data(config)
  assert server.ranges == [None]
  np.testing.assert_array_equal(images_of(build(config, 'test')), expected_cifar('test')[0])


def test_prepare_data_opens_a_data_set_of_the_user(tmp_path, caplog):
  @datasets.register_dataset(name='MINE_TO_PREPARE')
  def mine(config, split):
    return datasets.ArraySource(np.zeros((5, 8, 8, 3), np.uint8), np.zeros(5))

  with caplog.at_level('INFO'):
    prepare_data.prepare_data(files.data_config(tmp_path, 'MINE_TO_PREPARE', 8))
  assert 'test: 5 images, 0 skipped, 0 classes' in caplog.text


# Data sets of TensorFlow Datasets.


@pytest.fixture
def stripes(tmp_path):
  tfds = pytest.importorskip('tensorflow_datasets')

  class Stripes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Ten images made here, stored as TensorFlow Datasets stores CIFAR-10."""

    name = 'stripes'
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = {
        'image': tfds.features.Image(shape=(40, 40, 3)),
        'label': tfds.features.ClassLabel(num_classes=10),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      for i in range(10):
        content = files.encoded(np.full((40, 40, 3), 20 * i, np.uint8), 'png')
        yield i, {'image': io.BytesIO(content), 'label': i}

  return Stripes(data_dir=tmp_path, file_format='array_record')


def test_tensorflow_datasets_are_read_without_tensorflow(stripes, tmp_path):
  stripes.download_and_prepare()
  source = tensorflow_datasets.tfds_source(
    'stripes', 'train', data_dir=tmp_path, transform=lambda image: datasets.resize(image, 32)
  )
  config = files.data_config(tmp_path, 'TFDS', 32, builder='stripes')
  for opened in (source, build(config, 'train')):
    examples = [opened[i] for i in range(len(opened))]
    assert sorted(example['label'] for example in examples) == list(range(10))
    for example in examples:
      np.testing.assert_array_equal(example['image'], np.full((32, 32, 3), 20 * example['label']))
  with pytest.raises(UserError, match="The split 'test' of 'stripes' is not prepared in"):
    build(config, 'test')
  assert 'tensorflow' not in sys.modules


def described(features):
  return {'description': '{a text', **features}


def legacy(features):
  return {'type': features['pythonClassName'], 'content': {}}


def nested(features):
  inner = json.dumps({'image': {'type': features['pythonClassName'], 'content': {}}})
  return {'pythonClassName': f'{FEATURES}.features_dict.FeaturesDict', 'json': {'json': inner}}


FEATURES = 'tensorflow_datasets.core.features'


@pytest.mark.parametrize(
  ('write', 'builder'),
  [(described, 'stripes'), (legacy, 'Stripes'), (nested, 'stripes:1.0.0')],
)
def test_prepared_data_that_name_a_module_do_not_have_it_imported(
  write, builder, stripes, tmp_path, monkeypatch
):
  stripes.download_and_prepare()
  (tmp_path / 'modules').mkdir()
  (tmp_path / 'modules' / 'hostile.py').write_text(f'open({str(tmp_path / "run")!r}, "w")')
  monkeypatch.syspath_prepend(tmp_path / 'modules')
  folder = tmp_path / 'stripes' / '1.0.0'
  folder.rename(tmp_path / 'elsewhere')
  folder.symlink_to(tmp_path / 'elsewhere')
  path = folder / 'features.json'
  features = json.loads(path.read_text())
  path.write_text(json.dumps(write(features | {'pythonClassName': 'hostile.Image'})))
  config = files.data_config(tmp_path, 'TFDS', 32, builder=builder)
  with pytest.raises(UserError, match="^[^ ]*features.json names 'hostile.Image', code "):
    build(config, 'train')
  assert not (tmp_path / 'run').exists()
  path.write_text('{')
  with pytest.raises(UserError, match='features.json cannot be read .*: copy the data set again'):
    build(config, 'train')


@pytest.mark.parametrize('builder', ['stripes', 'no_such_builder'])
def test_tensorflow_datasets_are_never_prepared(builder, stripes, tmp_path):
  config = files.data_config(tmp_path, 'TFDS', 32, builder=builder)
  with pytest.raises(UserError, match=f"The split 'train' of '{builder}' is not prepared") as error:
    build(config, 'train')
  assert '\n' not in str(error.value)
  assert os.listdir(tmp_path) == []
  config.data.builder = ''
  with pytest.raises(UserError, match="data.builder='' is empty"):
    build(config, 'train')


def test_lsun_without_a_category_is_refused(tmp_path):
  with pytest.raises(UserError, match='needs a data.category'):
    build(files.data_config(tmp_path, 'LSUN', 64), 'train')


def test_no_data_set_needs_tensorflow(church, tmp_path, monkeypatch):
  for _, make in MAKERS.values():
    make(tmp_path)
  files.svhn_file(tmp_path / 'test_32x32.mat')
  pixels = files.smooth_picture(64, 64, 0)
  (tmp_path / 'faces-r06.tfrecords').write_bytes(files.record(files.example(pixels)))
  program = f"""
import pathlib, sys

class Blocker:
  def find_spec(self, name, *_):
    if name.partition('.')[0] == 'tensorflow':
      raise ImportError('TensorFlow is blocked')

sys.meta_path.insert(0, Blocker())
import pytest
from modes import prepare_data
from tests import published_files as files

folder = pathlib.Path({str(tmp_path)!r})
patch = pytest.MonkeyPatch()
names = {[*MAKERS, 'test_32x32.mat', 'list_eval_partition.txt']}
for name in names:
  files.publish(patch, folder / name)
for dataset in ('CIFAR10', 'SVHN', 'CELEBA', 'LSUN', 'FFHQ', 'CelebAHQ'):
  size = 32 if dataset in ('CIFAR10', 'SVHN') else 64
  settings = {{'category': 'church_outdoor'}} if dataset == 'LSUN' else {{}}
  config = files.data_config(folder, dataset, size, **settings)
  prepare_data.prepare_data(config)
"""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=environment, check=True)
