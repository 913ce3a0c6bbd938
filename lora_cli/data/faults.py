"""Bad rows, collected: the first five are shown and all are counted, so one run tells what a file needs."""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.errors import InputError

SHOWN = 5


class Faults:
    """Bad rows of one split; `source` is what the user wrote for it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self.lines: list[str] = []
        """The first SHOWN."""

    def add(self, fault: InputError | str) -> None:
        """Count one bad row; its message is kept if it is among the first."""
        self.count += 1
        if len(self.lines) < SHOWN:
            line = fault if isinstance(fault, str) else fault.lines[0]
            # It may hold what the row holds; a manifest and a log take only characters that are some.
            self.lines.append(line.encode(errors="backslashreplace").decode())

    def join(self, count: int, lines: Sequence[str]) -> None:
        """Add the bad rows of a part of the split."""
        self.count += count
        self.lines += lines[: SHOWN - len(self.lines)]

    def raise_if_any(self) -> None:
        """Raise what was collected.

        Raises:
            InputError: if there was a bad row; one line for each of the first five, then the total.
        """
        if not self.count:
            return
        lines = list(self.lines)
        if self.count > len(lines):
            lines.append(f"{self.source}: {self.count} bad rows in all, the first {len(lines)} are above")
        raise InputError(lines)
