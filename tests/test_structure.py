"""The rooms of the program: no cycles, and the foundation knows nothing of the method."""

import re

from docs import structure

GRAPH = structure.import_graph()
ROOMS = structure.room_graph(GRAPH)


def test_a_cycle_is_found_where_there_is_one():
  assert structure.cycle({'a': {'b'}, 'b': {'c'}, 'c': {'b'}}) in (['b', 'c'], ['c', 'b'])
  assert structure.cycle({'a': {'b'}, 'b': {'c'}, 'c': set()}) == []


def test_imports_of_a_known_module_are_read():
  assert {'sde_lib', 'train_state', 'models.utils', 'runtime.errors'} <= GRAPH['losses']
  assert 'run_lib' in GRAPH['main']  # inside a function


def test_neither_modules_nor_rooms_import_one_another_in_a_cycle():
  assert structure.cycle(GRAPH) == []
  assert structure.cycle(ROOMS) == []


def test_the_foundation_imports_nothing_of_the_method():
  assert ROOMS['configs'] == set()
  assert ROOMS['runtime'] == {'configs'}
  assert ROOMS['sde_lib'] == {'runtime'}
  assert ROOMS['metrics'] == {'runtime'}


def test_picture_and_page_show_every_room():
  page = (structure.ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
  named = set(re.findall(r'`(\w+)(?:/|\.py)`', page))
  assert named >= ROOMS.keys()
  picture = (structure.ROOT / 'docs' / 'architecture.svg').read_text(encoding='utf-8')
  drawn = set(re.findall(r'<!-- (\w+)(?:/|\.py) -->', picture))
  assert drawn == ROOMS.keys()
