"""`python -m lora_cli RECIPE` trains: what `torchrun --nproc-per-node 2 -m lora_cli RECIPE` starts."""

from __future__ import annotations

import sys

from lora_cli.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
