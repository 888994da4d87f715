"""What is recorded of the packages agrees with requirements.txt and with itself."""

import json
import pathlib
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]


def locked():
  """The version of each locked package and how many hashes it has."""
  text = (ROOT / 'requirements.lock').read_text()
  entries = re.findall(r'^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n)+)', text, re.M)
  assert len(entries) == len(re.findall(r'^[^ #\n]', text, re.M))  # nothing without a hash
  return {canonicalize_name(name): version for name, version, _ in entries}


def requirements():
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  texts = (line.partition('#')[0].strip() for line in lines)
  return [Requirement(text) for text in texts if text]


def test_the_lock_file_has_a_hash_and_an_allowed_version_of_every_requirement():
  versions = locked()
  wrong = [
    f'{requirement}: {versions.get(canonicalize_name(requirement.name))}'
    for requirement in requirements()
    if not requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), '0'))
  ]
  assert not wrong, 'run dependencies/lock.sh'


def test_every_requirement_has_a_lowest_version():
  open_ended = [str(r) for r in requirements() if not any(s.operator == '>=' for s in r.specifier)]
  assert not open_ended  # dependencies/try.sh lowest could not try it


def test_bill_of_materials_and_licences_list_what_is_locked():
  materials = json.loads((ROOT / 'dependencies/sbom.json').read_text())['components']
  assert {canonicalize_name(m['name']): m['version'] for m in materials} == locked()
  rows = (ROOT / 'dependencies/licences.txt').read_text().splitlines()[1:]
  licences = {canonicalize_name(row.split(' | ')[0]): row.split(' | ') for row in rows}
  assert {name: row[1] for name, row in licences.items()} == locked()
  unknown = [name for name, row in licences.items() if row[2] in ('', 'UNKNOWN')]
  assert not unknown
