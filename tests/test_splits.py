"""How own pictures are split into training and test pictures, and into classes."""

import pytest

from runtime.errors import UserError
from sources import splits
from sources.stores import File


def files(*names, **fields):
  return [File(name, **fields) for name in sorted(names)]


def names(found):
  return {split: [file.name for file in members] for split, members in found.items()}


MANY = [f'{i:04d}.png' for i in range(2000)]


def test_hash_decides_for_a_share_and_a_new_picture_moves_no_other():
  for fraction in (0.1, 0.3):
    found = names(splits.split(files(*MANY), test_fraction=fraction))
    assert sorted(found['train'] + found['test']) == MANY
    deviation = (fraction * (1 - fraction) * len(MANY)) ** 0.5
    assert abs(len(found['test']) - fraction * len(MANY)) < 4 * deviation
  found = names(splits.split(files(*MANY)))
  more = names(splits.split(files(*MANY, 'new.png', '0000a.png')))
  for split in ('train', 'test'):
    assert set(found[split]) <= set(more[split])
  wider = names(splits.split(files(*MANY), test_fraction=0.2))
  assert set(found['test']) <= set(wider['test'])


def test_hash_is_of_the_name_in_either_way_of_writing_accents():
  composed = [f'\u00e9{name}' for name in MANY]
  decomposed = [f'e\u0301{name}' for name in MANY]
  one, other = (splits.split(files(*kind))['test'] for kind in (composed, decomposed))
  assert [file.name[1:] for file in one] == [file.name[2:] for file in other]


@pytest.mark.parametrize('fraction', [0.001, 0.1, 0.999])
@pytest.mark.parametrize('count', [2, 3, 5])
def test_neither_split_is_empty(count, fraction):
  for start in range(0, 200, count):
    found = splits.split(files(*MANY[start : start + count]), test_fraction=fraction)
    assert found['train']
    assert found['test']
    assert len(found['train']) + len(found['test']) == count


def test_single_picture_is_in_both_splits_with_a_warning(caplog):
  assert names(splits.split(files('1.png'))) == {'train': ['1.png'], 'test': ['1.png']}
  assert '1.png, is used for training and for testing' in caplog.text


@pytest.mark.parametrize('fraction', [0.0, 1.0, -0.1, float('nan')])
def test_fraction_outside_0_to_1_is_refused(fraction):
  with pytest.raises(UserError, match=f'data.test_fraction={fraction} must be between 0 and 1'):
    splits.split(files('1.png', '2.png'), test_fraction=fraction)


@pytest.mark.parametrize('test', ['test', 'Val', 'valid', 'VALIDATION', 'dev'])
def test_folders_of_splits_are_found_in_any_case(test):
  found = names(splits.split(files('Train/1.png', 'Train/a/2.png', f'{test}/deep/1.png')))
  assert found == {'train': ['Train/1.png', 'Train/a/2.png'], 'test': [f'{test}/deep/1.png']}


def test_train_alone_is_shared_by_hash():
  found = names(splits.split(files(*(f'train/{name}' for name in MANY))))
  assert len(found['train']) + len(found['test']) == len(MANY)
  assert 100 < len(found['test']) < 300


def test_val_beside_test_is_unused_with_a_word(caplog):
  with caplog.at_level('INFO', logger='absl'):
    found = splits.split(files('train/1.png', 'test/2.png', 'val/3.png', 'dev/4.png'))
  assert names(found) == {'train': ['train/1.png'], 'test': ['test/2.png']}
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
    splits.split(files(*others))
  assert '\n' not in str(error.value)


def test_files_with_a_fault_are_in_no_split():
  bad = files('._1.png', '__MACOSX/2.png', fault='hidden file')
  found = splits.split([*bad, *files('train/1.png', 'test/1.png')])
  assert names(found) == {'train': ['train/1.png'], 'test': ['test/1.png']}
  with pytest.raises(UserError, match=r'no picture that can be read .2 skipped: 2 x hidden file'):
    splits.split(bad)
  with pytest.raises(UserError, match=r'no picture that can be read .no file ends in .png, .jpg'):
    splits.split([])


def test_list_of_test_pictures_decides(tmp_path):
  path = tmp_path / 'list.txt'
  path.write_text('# mine\n\n  b/2.png\r\ne\u0301.png\n', encoding='utf-8')
  everything = files('a/1.png', 'b/2.png', '\u00e9.png', 'train/3.png', 'x.png')
  found = names(splits.split(everything, test_list=str(path)))
  assert found == {'train': ['a/1.png', 'train/3.png', 'x.png'], 'test': ['b/2.png', '\u00e9.png']}


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (
      '1.png\nz.png\ny.png\n',
      "names 'z.png', which is not there: give names relative to",
    ),
    ('# nothing\n', "leaves no picture for the split 'test': list some of"),
    ('1.png\n2.png\n', "leaves no picture for the split 'train': list some of"),
    (None, 'cannot be read .*No such file.*: give a text file of names'),
  ],
)
def test_unusable_list_is_refused(tmp_path, text, message):
  if text is not None:
    (tmp_path / 'list.txt').write_text(text)
  with pytest.raises(UserError, match=f'data.test_list=.*list.txt. {message}'):
    splits.split(files('1.png', '2.png'), test_list=str(tmp_path / 'list.txt'))


# --- classes ---


def test_classes_are_numbered_alike_in_both_splits():
  train = files('train/b/1.png', 'train/B/deep/1.png', 'train/é/1.png')
  test = files('val/a/1.png', 'val/b/1.png')
  labels, class_names = splits.classes({'train': train, 'test': test})
  assert class_names == ['B', 'a', 'b', 'é']
  assert labels == {'train': [0, 2, 3], 'test': [1, 2]}


def test_picture_outside_the_folders_of_classes_means_that_there_are_none(caplog):
  for found in (files('a/1.png', 'b/1.png', '1.png'), files('train/a/1.png', 'train/1.png')):
    with caplog.at_level('INFO', logger='absl'):
      labels, class_names = splits.classes({'train': found})
    assert class_names == []
    assert set(labels['train']) == {0}
    assert len(caplog.records) == 1
    caplog.clear()
  assert splits.classes({'train': files('1.png')}) == ({'train': [0]}, [])
  assert splits.classes({'train': files('only/1.png')}) == ({'train': [0]}, [])
  assert not caplog.records


def test_labels_of_the_store_win():
  given = {'train': [File('a/1.png', label=2)], 'test': [File('b/1.png', label=0)]}
  assert splits.classes(given) == ({'train': [2], 'test': [0]}, ['0', '1', '2'])
  assert splits.classes(given, ['x', 'y', 'z'])[1] == ['x', 'y', 'z']
  none = {'train': [File('a/1.png', label=0), File('b/1.png', label=0)]}
  assert splits.classes(none) == ({'train': [0, 0]}, [])


@pytest.mark.parametrize(
  ('labels', 'class_names', 'message'),
  [
    ((1, None), [], "labels, but none for '2.png': label all pictures or none"),
    ((1, 10**9), [], 'has a label 1000000000, not from 0 to 99999: number them from 0'),
    ((0, -1), [], 'has a label -1, not from 0'),
    ((0, 2), ['a', 'b'], 'has a label 2, not from 0 to 1'),
  ],
)
def test_unusable_labels_are_refused(labels, class_names, message):
  found = [File(f'{i + 1}.png', label=label) for i, label in enumerate(labels)]
  with pytest.raises(UserError, match=message):
    splits.classes({'train': found}, class_names)
