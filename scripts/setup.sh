#!/usr/bin/env bash
# Make .venv and install lora-cli into it. Usage: bash scripts/setup.sh [dev]. Does nothing when all is in place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old (Python 3.11 or newer is needed; name one with PYTHON=...)" >&2
    exit 2
}

# The stamp is the text of what was asked for: another constraint, another extra or a moved folder installs again.
stamp=".venv/installed-${extra:-base}"
wanted="$(pwd; cat pyproject.toml constraints.txt)"
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

echo "setting up .venv (once; takes a minute or two)"
[ -x .venv/bin/python ] && [ "$(cat .venv/location 2>/dev/null)" = "$(pwd)" ] || {
    rm -rf .venv
    "$python" -m venv .venv
    pwd > .venv/location
}
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
    --editable ".${extra:+[$extra]}"
printf '%s\n' "$wanted" > "$stamp"
