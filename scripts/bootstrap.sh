#!/usr/bin/env bash
# Make .venv hold this project and what it was tested with. Does nothing when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.bootstrapped
wanted=$(cat pyproject.toml constraints.txt scripts/bootstrap.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "bootstrap: Python 3.11 or newer is needed, found $("$python" --version); set PYTHON=/path/to/python3.11" >&2
  exit 4
fi

echo "bootstrap: installing into .venv (the first time takes a few minutes)" >&2
if command -v uv >/dev/null 2>&1; then
  [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
  uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[dev]'
else
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
fi
echo "$wanted" > "$stamp"
