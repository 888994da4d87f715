"""What users of the samplers meet: names, keys, watching, recompilation, network calls."""

import subprocess
import sys


def test_importing_sampling_registers_every_method():
  code = 'import sampling; print(*sampling._METHODS.names())'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == ['ddim', 'dpm_solver++', 'heun', 'ode', 'pc']
