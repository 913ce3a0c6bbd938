"""What can go wrong, and the exit code each fault has.

Every exception here is one the user can act on; its text is the line printed after `error: `. A fault of ours is
any other exception: exit code 1, the traceback goes to the log file. No torch here: the command line imports this
before it knows whether the recipe is valid.

    0 done · 2 bad input · 3 diverged · 4 out of memory or disk · 5 a gate was missed · 130/143 stopped by a signal
"""

from __future__ import annotations

from collections.abc import Iterable


class LoraError(Exception):
    """A fault the user can act on; `lines` are printed one under another, each as `error: <line>`."""

    exit_code = 1

    def __init__(self, message: str | Iterable[str]) -> None:
        self.lines: list[str] = [message] if isinstance(message, str) else list(message)
        super().__init__("\n".join(self.lines))


class InputError(LoraError, ValueError):
    """Bad recipe, data, model folder, adapter or path: nothing was written. Exit code 2."""

    exit_code = 2


class DivergedError(LoraError, ArithmeticError):
    """A loss or gradient that is not finite; the update was not applied. Exit code 3."""

    exit_code = 3


class ResourceError(LoraError, OSError):
    """Out of memory or disk. Exit code 4."""

    exit_code = 4


class GateError(LoraError, ValueError):
    """What `--min`, `--max` or `--strict` asks for was missed; the run or report itself is complete. Exit code 5."""

    exit_code = 5


class Stopped(LoraError):
    """SIGINT or SIGTERM: the run was saved and can be resumed. Exit code 128 + signal number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
