"""How a command ends: every fault becomes `error: ...` lines on stderr and an exit code, see `errors.py`."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path

import typer

from lora_cli import disk, interrupts
from lora_cli.errors import LoraError, ResourceError
from lora_cli.redaction import redacted

LOG_NAME = "lora-cli-error.log"
_LONGEST = 1900
"""Characters of an error line."""
_HEAD_START = 3.0
"""Seconds: torchrun ends all processes when one ends, and the one that tells must not be cut off by a silent one."""

run_folder: ContextVar[Path | None] = ContextVar("run_folder", default=None)
"""Where the traceback of a fault of ours goes; set by a command as soon as it knows the run."""

# The base of Typer's usage errors; its module moved between releases, `BadParameter` did not.
_UsageFault = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def new_app() -> typer.Typer:
    """Return an empty app: plain help, since rich would double the start-up time."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run an app on the command line's arguments (or the ones given) and return the exit code.

    Raises:
        Interrupted: a signal came outside of the pipeline.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must not stop a run
    run_folder.set(None)
    command = typer.main.get_command(app)
    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = command.main(args=args, prog_name=name, standalone_mode=False)
    except LoraError as error:
        return _report(error.lines, error.exit_code)
    except MemoryError:
        return _report(["out of memory (lower train.micro_batch_tokens)"], ResourceError.exit_code)
    except Exception as error:  # noqa: BLE001 - where every fault of ours ends; nobody is above
        interrupts.check()  # what a signal breaks in other processes is no fault
        if isinstance(error, _UsageFault):
            return _report([_usage_line(error, name)], 2)
        if isinstance(error, OSError) and error.errno in disk.NUMBERS:
            return _report(disk.fault(error).lines, ResourceError.exit_code)
        return _report([_log_fault(error)], 1)
    return code if isinstance(code, int) else 0


def _report(lines: Sequence[str], code: int) -> int:
    # Under torchrun every process finds the same bad input, loss or signal, or hears of it: one of them tells.
    if code not in (1, ResourceError.exit_code) and os.environ.get("RANK", "0") != "0":
        time.sleep(_HEAD_START)
        return code
    for line in lines:
        shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in redacted(line))
        if len(shown) > _LONGEST:  # what was written may be repeated in it; what to do stands at its end
            shown = f"{shown[: _LONGEST - 320]} [...] {shown[-300:]}"
        print(f"error: {shown}", file=sys.stderr)
    return code


def _usage_line(error: Exception, name: str) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    if "option" in message and any(arg.startswith("--") and "." in arg for arg in message.split()):
        return f"{message} (an override has no dashes: train.epochs=3)"
    return f"{message} (see {name} --help)"


def _log_fault(error: Exception) -> str:
    """Write the traceback to a file and return the line that names it."""
    text = redacted("".join(traceback.format_exception(error)))
    kind = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    folder = run_folder.get()
    try:
        if folder is not None and folder.is_dir():
            path = folder / LOG_NAME
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        else:
            # A fixed name in a folder that all users share could be a link laid out by another one.
            handle, name = tempfile.mkstemp(prefix="lora-cli-error-", suffix=".log")
            path = Path(name)
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
    except OSError as fault:
        return f"a fault of lora-cli: {kind} (its log cannot be written: {fault.strerror})"
    return f"a fault of lora-cli: {kind} (traceback in {path})"
