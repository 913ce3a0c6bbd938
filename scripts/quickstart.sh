#!/usr/bin/env bash
# From a fresh clone to a tuned model: set up .venv, train on the bundled tickets, show what to try next.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/lora-train configs/quickstart.yaml "$@"
cat <<'TEXT'

Your adapter is in runs/quickstart/adapter. What to try next:

  source .venv/bin/activate
  cat runs/quickstart/summary.json                            # what was measured
  head -3 runs/quickstart/generations.jsonl                   # answers of the base and of the tuned model
  lora-eval runs/quickstart --min exact_match=0.9             # score it again; a missed gate exits 5
  lora-merge runs/quickstart --output runs/quickstart-merged  # plain weights for AutoModelForCausalLM
  lora-train configs/quickstart.yaml run.output=runs/r4 adapter.rank=4
  lora recipe explain train.schedule
TEXT
