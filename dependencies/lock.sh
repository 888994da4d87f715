#!/usr/bin/env bash
# Writes anew what is recorded of the packages that requirements.txt asks for: the lock file with its
# hashes, the licences and the bill of materials. Run the tests before you commit the result.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/tools"
"$here/tools/bin/pip" install --quiet 'uv>=0.5' 'cyclonedx-bom>=5,<8' 'pip-licenses>=5,<6'

"$here/tools/bin/uv" pip compile --quiet --no-header --upgrade --generate-hashes --python-version 3.11 \
  requirements.txt --output-file "$here/lock"
cat - "$here/lock" > requirements.lock <<'END'
# The versions that all tests last passed with, on Python 3.11, and the hashes of their files.
# pip install --require-hashes -r requirements.lock
# Made by dependencies/lock.sh.
END

"$here/tools/bin/uv" venv --quiet --python 3.11 "$here/run"
"$here/tools/bin/uv" pip install --quiet --python "$here/run/bin/python" --require-hashes -r requirements.lock
"$here/tools/bin/cyclonedx-py" environment "$here/run/bin/python" --output-reproducible \
  --output-format JSON --output-file dependencies/sbom.json
# Where a package puts its whole licence into that field, its first line is what names it.
"$here/tools/bin/pip-licenses" --python "$here/run/bin/python" --from=mixed --format=csv |
  python3 -c 'import csv, sys
for row in csv.reader(sys.stdin):
  print(*(field.strip().split("\n")[0].strip() for field in row), sep=" | ")' > dependencies/licences.txt
