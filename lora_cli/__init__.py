"""lora-cli: fine-tune language models from one YAML recipe. Start reading at `pipeline.py`."""

from __future__ import annotations

from lora_cli import network

__version__ = "0.1.0"

network.silence()
