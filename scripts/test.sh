#!/usr/bin/env bash
# A virtual environment, the package with its test extra, then every check.
# --all runs the slow tests too; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
slow=(-m "not slow")
[ "${1:-}" != --all ] || { slow=(); shift; }
venv=${VENV:-.venv-test}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet -e ".[test]"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
# one thread for each of the two workers: more would wait for each other
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n 2 "${slow[@]}" "$@"
