"""lora-cli: fine-tune language models from one YAML recipe. Start reading at `pipeline.py`."""

__version__ = "0.1.0"
