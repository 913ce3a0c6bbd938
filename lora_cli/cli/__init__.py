"""`lora`, `lora-train`, `lora-eval`, `lora-merge`: each returns its exit code.

The commands are imported when one is called, and signals are handled before that: Ctrl-C in the first moment of a
command shows no traceback either.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lora_cli import interrupts

__all__ = ["eval_main", "main", "merge_main", "train_main"]


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run `lora-train` and return its exit code."""
    return _run("lora-train", arguments)


def eval_main(arguments: Sequence[str] | None = None) -> int:
    """Run `lora-eval` and return its exit code."""
    return _run("lora-eval", arguments)


def merge_main(arguments: Sequence[str] | None = None) -> int:
    """Run `lora-merge` and return its exit code."""
    return _run("lora-merge", arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lora` and return its exit code."""
    return _run("lora", arguments)


def _run(name: str, arguments: Sequence[str] | None) -> int:
    """Run a command on the arguments given, or on those of the process, which then ends with it."""
    try:
        with interrupts.handled():
            from lora_cli.cli import commands, exits

            return exits.run(commands.app(name), name, arguments)
    except interrupts.Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one tells
            print(f"error: {stop}", file=sys.stderr)
        return stop.exit_code
    finally:
        if arguments is None:
            interrupts.let_go()
