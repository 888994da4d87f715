"""Everything that the documentation tells readers to type works, and its links lead somewhere.

Python blocks of a page run one after the other, in one namespace, in a folder where the files of
the repository are to be found; a small network stands for that of the digits. A comment in front of
a block changes that:

  <!-- run: n_steps=1000 => n_steps=2 -->   runs it with other text, to be quick
  <!-- skip: minutes -->                    does not run it, for one of `REASONS`

Of shell blocks the commands are parsed, and the configurations that they describe are checked.
"""

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import urllib.parse

import pytest
import yaml
from ml_collections import ConfigDict

import controllable_generation
import run_lib
import sampling
import sde_lib
from models.classifier import CLASSIFIERS
from modes.preparation import _registered_keys
from runtime import configuration
from runtime.errors import UserError
from sources.base import DATASETS
from tests import tiny_config
from tests.processes import ROOT, environment
from tests.test_documented_extensions import REGISTRIES

PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), ROOT / 'assets' / 'README.md'])
REASONS = {
  'GPU': 'needs an accelerator',
  'download': 'needs a file that is not in the repository',
  'cluster': 'needs several machines, or a launcher',
  'minutes': 'takes minutes',
}
LANGUAGES = {'python', 'sh', 'text', 'bibtex', 'yaml'}

_BLOCK = re.compile(
  r'(?P<comment>(?:^<!--[^\n]*-->\n+)?)^(?P<fence>```+)(?P<language>\S*)[^\n]*\n'
  r'(?P<text>.*?)^(?P=fence)\s*$',
  re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r'<!-- (?P<what>run|skip): (?P<how>.*?) -->')


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block of a page: its language and text, and what the comment before it says."""

  page: pathlib.Path
  line: int
  language: str
  text: str
  skipped: str = ''

  def __str__(self):
    return f'{self.page.relative_to(ROOT)}:{self.line}'


def blocks_of(page):
  content = page.read_text(encoding='utf-8')
  for match in _BLOCK.finditer(content):
    line = content[: match.start('fence')].count('\n') + 1
    text, skipped = match['text'], ''
    if comment := _COMMENT.match(match['comment']):
      if comment['what'] == 'skip':
        skipped = comment['how']
      else:
        old, _, new = comment['how'].partition(' => ')
        assert old in text, f'{page}:{line} has no {old!r} to replace'
        text = text.replace(old, new)
    yield Block(page, line, match['language'], text, skipped)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def name_of(page):
  return str(page.relative_to(ROOT))


def test_every_block_says_what_it_is_and_why_it_does_not_run():
  assert BLOCKS
  for block in BLOCKS:
    assert block.language in LANGUAGES, f'{block} has the language {block.language!r}'
    assert not block.skipped or block.skipped in REASONS, f'{block}: skip: {block.skipped}'


# Python.

RUN = {}  # by page
for block in BLOCKS:
  if block.language == 'python' and not block.skipped and '--8<--' not in block.text:
    RUN.setdefault(name_of(block.page), []).append(block)


@pytest.fixture(scope='module')
def small_network(tmp_path_factory):
  """Stands for the network of the digits: the programs of pages then compile in no time."""
  workdir = tmp_path_factory.mktemp('small')
  config = tiny_config.get_config()
  config.training.update(n_iters=1, snapshot_sampling=False)
  run_lib.train(config, workdir)
  return run_lib.export_checkpoint(config, workdir)


@pytest.fixture
def like_the_root(small_network, tmp_path, monkeypatch):
  """A folder in which a page may write, with what is in the repository."""
  (tmp_path / 'assets').mkdir()
  (tmp_path / 'assets' / 'digits.safetensors').symlink_to(small_network)
  for path in [*ROOT.iterdir(), *(ROOT / 'assets').iterdir()]:
    link = tmp_path / path.relative_to(ROOT)
    if path.name not in ('runs', 'site') and not path.name.startswith('.') and not link.exists():
      link.symlink_to(path)
  monkeypatch.chdir(tmp_path)
  for registry in REGISTRIES:  # what a page registers is forgotten
    monkeypatch.setattr(registry, '_entries', dict(registry._entries))


@pytest.mark.parametrize('page', RUN)
def test_the_python_of_a_page_runs(page, like_the_root, quickly_compiled):
  namespace = {'__name__': 'page'}
  for block in RUN[page]:
    # Lines are counted from the top of the page, as in a traceback.
    tree = ast.increment_lineno(ast.parse(block.text), block.line)
    exec(compile(tree, str(block.page), 'exec'), namespace)


# Shell.


def commands_of(text):
  """The commands of a shell block, as lists of words: without comments, joined over lines."""
  for line in text.replace('\\\n', ' ').splitlines():
    line = line.removeprefix('$ ')
    line = line.replace('<config>', 'configs/vp/mnist_ddpmpp_continuous.py')
    line = re.sub(r'<[\w ]+>', 'placeholder', line)
    for words in _split(shlex.split(line, comments=True)):
      while words and re.fullmatch(r'[A-Z_]+=.*|srun|--ntasks=\d+', words[0]):
        words = words[1:]
      if words:
        yield words


def _split(words):
  """The commands that '&&' joins."""
  command = []
  for word in [*words, '&&']:
    if word == '&&':
      yield command
      command = []
    else:
      command.append(word)


COMMANDS = [
  (block, words)
  for block in BLOCKS
  if block.language == 'sh' and not block.skipped
  for words in commands_of(block.text)
]
PYTHON = ('python', 'python3', '.venv/bin/python')

# Parses commands, each in a process of its own, and prints their configurations as JSON. The
# processes are forked from one that imports neither JAX nor a network.
_PARSE = """
import json, os, sys
import main

for words in json.loads(sys.stdin.read()):
  sys.stdout.flush()
  child = os.fork()
  if not child:
    try:
      sys.argv = ['main.py', *words]  # where ml_collections looks for overrides
      main.parse_flags(sys.argv)
      config = main._CONFIG.value
      result = {'config': config and config.to_dict()}
    except SystemExit as error:
      result = {'error': str(error)}
    print(json.dumps(result), flush=True)
    os._exit(0)
  os.waitpid(child, 0)
"""


def test_every_command_of_main_describes_a_run_that_can_start():
  cases = {}  # by the words that matter: a directory does not
  for block, words in COMMANDS:
    if words[0] in PYTHON and words[1:2] == ['main.py']:
      key = tuple(word for word in words[2:] if not word.startswith('--workdir'))
      cases.setdefault(key, (f'{block}: {shlex.join(words)}', words[2:]))
  assert len(cases) > 10
  process = subprocess.run(
    [sys.executable, '-c', _PARSE],
    input=json.dumps([words for _, words in cases.values()]),
    cwd=ROOT,
    env=environment() | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  results = [json.loads(line) for line in process.stdout.splitlines()]
  assert len(results) == len(cases), process.stderr
  failed = []
  for (where, words), result in zip(cases.values(), results, strict=True):
    error = result.get('error')
    # The files of docs/extending register what they use, and have tests of their own.
    if result.get('config') and not any('docs/extending/' in word for word in words):
      try:
        _check(ConfigDict(result['config']))
      except UserError as wrong:
        error = str(wrong)
    if error:
      failed.append(f'{where}\n  {error}')
  assert not failed, '\n'.join(failed)


def _check(config):
  """The checks of a configuration that need no network, and so take no time."""
  config = configuration.complete(config, _registered_keys(config))
  sampling.check(config, sde_lib.get_sde(config))
  controllable_generation.check(config)


def test_every_other_command_exists_with_its_flags():
  targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
  for block, words in COMMANDS:
    if words[0] == 'make':
      wanted = {word for word in words[1:] if '=' not in word}
      assert wanted <= targets, f'{block}: {shlex.join(words)}'
    elif words[:3] == ['python3', '-m', 'venv']:
      continue
    elif words[0] in PYTHON and words[1] == '-m':
      source = _source(words[2])
      assert source, f'{block}: there is no module {words[2]}'
      for word in words[3:]:
        flag = word.split('=')[0]
        found = f"'{flag}'" in source or f"'{flag[2:]}'" in source  # argparse or absl
        assert found or not flag.startswith('--'), f'{block}: {words[2]} {flag}'
    elif words[0] in (*PYTHON, 'bash'):
      assert (ROOT / words[1]).is_file(), f'{block}: {shlex.join(words)}'


def _source(module):
  """The text of a module of the repository, or of a package with all of its modules."""
  path = ROOT / module.replace('.', '/')
  files = path.glob('*.py') if path.is_dir() else [path.with_suffix('.py')]
  return '\n'.join(file.read_text(encoding='utf-8') for file in files if file.is_file())


# Names of settings in the text.

_SETTING = re.compile(
  r'`(?:--)?(?:config\.)?(?P<section>training|parallel|sampling|likelihood|eval|data|model|optim|'
  r'classifier)\.(?P<key>\w+)(?P<more>[^`]*)`'
)


def known_settings():
  """Every key of every section, those of all registered objects among them."""
  defaults = configuration.get_default_configs()
  known = {
    section: set(values) for section, values in defaults.items() if isinstance(values, ConfigDict)
  }
  for section, keys in _registered_keys(ConfigDict()).items():
    known[section] |= set(keys)
  for key in configuration.LEGACY:
    section, _, name = key.partition('.')
    known[section].add(name)
  known['data'] |= DATASETS.all_fields()
  known['classifier'] |= CLASSIFIERS.all_fields()
  return known


def test_every_setting_that_the_text_names_exists():
  known = known_settings()
  for page in PAGES:
    for match in _SETTING.finditer(page.read_text(encoding='utf-8')):
      section, key = match['section'], match['key']
      if match['more'].startswith(('(', '.')) or key in ('json', 'py', 'safetensors'):
        continue  # a call, or the name of a file
      named = key in known[section] or key.startswith('enable_')
      module = importlib.util.find_spec(section) and importlib.import_module(section)
      assert named or hasattr(module, key), f'{name_of(page)}: {section}.{key} is no setting'


# Links.

_LINK = re.compile(r'!?\[[^\]]*\]\((?P<target>[^)\s]+)(?: "[^"]*")?\)')
_HEADING = re.compile(r'^#+ +(?P<text>.*?)(?: *\{ *#(?P<id>[\w.-]+) *\})? *$', re.MULTILINE)


def anchors_of(page):
  """The anchors of the headings of a page, and of what its API reference documents."""
  text = _BLOCK.sub('', page.read_text(encoding='utf-8'))
  for heading in _HEADING.finditer(text):
    words = re.sub(r'[^\w\s-]', '', heading['text'].lower()).strip()
    in_site, on_github = re.sub(r'[-\s]+', '-', words), words.replace(' ', '-')
    yield from {heading['id']} if heading['id'] else {in_site} & {on_github}
  for module in re.findall(r'^::: (\S+)', text, re.MULTILINE):
    yield from _documented(importlib.import_module(module), module)


def _documented(owner, prefix):
  for name, value in vars(owner).items():
    if not name.startswith('_'):
      yield f'{prefix}.{name}'
      if isinstance(value, type):
        yield from (f'{prefix}.{name}.{member}' for member in dir(value))


def test_every_link_leads_somewhere():
  anchors = {}
  for page in PAGES:
    text = _BLOCK.sub('', page.read_text(encoding='utf-8'))
    for match in _LINK.finditer(re.sub(r'`[^`\n]*`', '`code`', text)):
      target, where = match['target'], f'{name_of(page)}: {match["target"]}'
      url = urllib.parse.urlsplit(target)
      if url.scheme:
        assert url.scheme in ('https', 'mailto'), where
        assert url.scheme != 'https' or re.fullmatch(r'[\w.-]+\.\w+', url.netloc), where
        continue
      path = pathlib.Path(os.path.normpath(page.parent / url.path)) if url.path else page
      assert path.exists(), f'{where} does not exist'
      if url.fragment:
        anchors.setdefault(path, set(anchors_of(path)))
        assert url.fragment in anchors[path], f'{where} has no such heading'


def test_every_page_is_in_the_navigation_and_the_navigation_has_no_others():
  text = (ROOT / 'mkdocs.yml').read_text(encoding='utf-8')
  listed = re.findall(r'(\S+\.md)$', text[text.index('\nnav:') :], re.MULTILINE)
  assert len(listed) == len(set(listed))
  docs = ROOT / 'docs'
  there = {path.relative_to(docs).as_posix() for path in docs.glob('**/*.md')}
  assert there | {'../CHANGELOG.md'} == set(listed)


def test_the_reference_lists_every_function_and_class_of_a_module():
  # What a module only passes on is left out, which is why the pages list what to show.
  for page in ROOT.glob('docs/api/*.md'):
    text = page.read_text(encoding='utf-8')
    for module, listed in re.findall(
      r'^::: (\S+)\n    options:\n      members:\n((?: +- \w+\n)+)', text, re.MULTILINE
    ):
      source = (ROOT / f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')
      defined = re.findall(r'^(?:def|class) ([A-Za-z]\w*)', source, re.MULTILINE)
      assert re.findall(r'- (\w+)', listed) == defined, name_of(page)


# Files that other programs read.


def test_the_citation_the_changelog_and_the_package_agree_on_the_version():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
  assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()
  paper = citation['preferred-citation']
  assert paper['title'].startswith('Score-Based Generative Modeling')
  assert [author['family-names'] for author in paper['authors']][::5] == ['Song', 'Poole']
  newest = re.search(
    r'^## ([\d.]+) - ([\d-]+)$', (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'), re.MULTILINE
  )
  assert (citation['version'], str(citation['date-released'])) == newest.groups()
  assert citation['version'] == importlib.import_module('score_sde').__version__


def test_the_forms_for_issues_have_what_a_form_must():
  forms = sorted((ROOT / '.github' / 'ISSUE_TEMPLATE').glob('[!c]*.yml'))
  assert [form.stem for form in forms] == ['bug', 'feature', 'question']
  for form in forms:
    content = yaml.safe_load(form.read_text(encoding='utf-8'))
    assert content['name']
    assert content['description']
    names = [field['id'] for field in content['body']]
    assert len(set(names)) == len(names)
    assert all(field['attributes']['label'] for field in content['body'])
