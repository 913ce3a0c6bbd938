#!/usr/bin/env bash
# What docs/reliability.md promises, tried: prints the table and writes it there. --full is the long form (half an hour).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -m reliability -n 2 --reliability-page=docs/reliability.md "$@"
