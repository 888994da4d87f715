"""The scripts that complete flags, run by the shells themselves."""

import shutil
import subprocess
import sys

import pytest

from tests.processes import ROOT

CONFIG = '--config=configs/vp/mnist_ddpmpp_continuous.py'

ANSWERS = {
  'python main.py --mo': {'--mode='},
  'python main.py --mode=tr': {'train', 'train_classifier'},
  'python main.py --mode=eval --dry': {'--dry_run'},
  'python main.py --config=configs/vp/mn': {'configs/vp/mnist_ddpmpp_continuous.py'},
  f'python main.py {CONFIG} --config.training.b': {'--config.training.batch_size='},
  f'python main.py {CONFIG} --config.model.nf': {'--config.model.nf='},
  'python other.py --mo': set(),
}

BASH = """
source <({python} main.py --completion=bash)
compopt() {{ :; }}
COMP_LINE='{line}' COMP_POINT={point}
_score_sde {python}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""

FISH = """
{python} main.py --completion=fish | source
complete -C '{line}' | string replace -r '\\t.*' ''
"""


def output(*command):
  process = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
  )
  assert process.returncode == 0, process.stderr
  return process.stdout


@pytest.mark.skipif(not shutil.which('bash'), reason='there is no bash')
@pytest.mark.parametrize('line', ANSWERS)
def test_bash_completes_flags_values_files_and_keys(line):
  script = BASH.format(python=sys.executable, line=line, point=len(line))
  assert set(output('bash', '-c', script).split()) == ANSWERS[line]


@pytest.mark.skipif(not shutil.which('fish'), reason='there is no fish')
def test_fish_completes_flags_and_their_values():
  script = FISH.format(python=sys.executable, line='python main.py --mode=tr')
  assert output('fish', '-c', script).split() == ['--mode=train', '--mode=train_classifier']


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
def test_the_script_is_one_that_the_shell_can_read(shell):
  script = output(sys.executable, 'main.py', f'--completion={shell}')
  assert 'prepare_data' in script
  assert '--dry_run' in script or '-l dry_run' in script
  if shutil.which(shell):
    output(shell, '-n', '-c', script)


def test_keys_are_those_of_the_configuration():
  keys = output(sys.executable, 'main.py', '--completion=keys', CONFIG).split()
  assert '--config.model.nf=' in keys
  assert '--config.seed=' in keys
