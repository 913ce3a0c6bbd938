#!/usr/bin/env bash
# Set up .venv, then ruff, mypy and pytest. Arguments go to pytest: bash scripts/test.sh tests/adapters -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# One thread a test process: two processes of two threads each would wait for each other.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" "$@"
