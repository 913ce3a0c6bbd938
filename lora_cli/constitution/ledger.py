"""Every answer of an endpoint, kept as soon as it comes: what was answered once is never asked, or paid, again.

    endpoint.jsonl: {"name", "request", "choice", "prompt_tokens", "completion_tokens", "cost"}

`request` is the sha256 of the request's body, `choice` what came back of it. Answers come in any order.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from lora_cli.constitution.journal import cut_torn_line, dumped, parse
from lora_cli.disk import writing


@dataclass(slots=True)
class Usage:
    """What was asked of endpoints, and what that cost in the recipe's prices."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        """Count one answer."""
        self.requests += 1
        self.prompt_tokens += line["prompt_tokens"]
        self.completion_tokens += line["completion_tokens"]
        self.cost += line["cost"]

    def line(self) -> str:
        """Return it in words."""
        cost = f", cost {self.cost:.4f}" if self.cost else ""
        return (
            f"endpoint: {self.requests:,} requests, {self.prompt_tokens:,} tokens of prompts,"
            f" {self.completion_tokens:,} of answers{cost}"
        )


class Ledger:
    """The answers of a run's endpoints, by the name of what was asked and the request."""

    def __init__(self, path: Path) -> None:
        self.path, self.usage = path, Usage()
        self._lock = threading.Lock()
        with writing(path):
            self._file: IO[bytes] = path.open("a+b")
        self._end = cut_torn_line(self._file, path)
        self._places: dict[tuple[str, str], int] = {}
        """Where an answer begins in the file: a run may have more of them than fit into memory."""
        self._file.seek(0)
        place = 0
        for number, content in enumerate(self._file, start=1):
            line = parse(content, f"{path}:{number}")
            self._places[line["name"], line["request"]] = place
            self.usage.add(line)
            place += len(content)

    def find(self, name: str, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what was answered; None where it was not asked yet."""
        with self._lock:
            place = self._places.get((name, request_of(body)))
            if place is None:
                return None
            self._file.seek(place)
            return dict(parse(self._file.readline(), str(self.path))["choice"])

    def keep(
        self,
        name: str,
        body: Mapping[str, Any],
        choice: Mapping[str, Any],
        *,
        prompt_tokens: int,
        completion_tokens: int,
        cost: float,
    ) -> None:
        """Write an answer to disk before it is used.

        Raises:
            ResourceError: it cannot be written.
        """
        request = request_of(body)
        line = {
            "name": name, "request": request, "choice": choice, "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens, "cost": cost,
        }  # fmt: skip
        content = dumped(line)
        with self._lock, writing(self.path):
            self._file.seek(0, os.SEEK_END)
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._places[name, request] = self._end
            self._end += len(content)
            self.usage.add(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()


def request_of(body: Mapping[str, Any]) -> str:
    """Return the sha256 of a request's body."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
