#!/usr/bin/env bash
# Runs the quick tests with the lowest or the newest versions that requirements.txt allows:
# dependencies/try.sh lowest|newest [python]
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  lowest) resolution=lowest-direct ;;
  newest) resolution=highest ;;
  *) echo 'Say which versions: dependencies/try.sh lowest, or newest.' >&2; exit 2 ;;
esac
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/tools"
"$here/tools/bin/pip" install --quiet 'uv>=0.5'
"$here/tools/bin/uv" venv --quiet --python "${2:-3.11}" "$here/run"
# Of the tools that run the tests the newest: they are not what is tried.
"$here/tools/bin/uv" pip install --quiet --python "$here/run/bin/python" --resolution "$resolution" \
  -r requirements.txt
"$here/tools/bin/uv" pip freeze --python "$here/run/bin/python" > "$here/versions"
"$here/tools/bin/uv" pip install --quiet --python "$here/run/bin/python" -r requirements-dev.txt \
  --constraint "$here/versions"
cat "$here/versions"
"$here/run/bin/python" -m pytest -q -n auto --dist worksteal -m 'not slow' "${@:3}"
