"""What a command did that reading data must not do: sockets, processes, unpickled classes, files that were opened."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EVENTS = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.bind",
    "os.system",
    "pickle.find_class",
)


@dataclass
class Seen:
    """Events of this process, and the files it opened."""

    events: list[str] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)


_seen: Seen | None = None
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        _seen.opened.add(os.path.abspath(os.fspath(arguments[0])))
    elif event in _EVENTS:
        _seen.events.append(f"{event} {arguments!r}"[:200])


@contextmanager
def watched() -> Iterator[Seen]:
    """Yield what is seen within it; an audit hook cannot be taken away again, so it is installed once and left idle."""
    global _seen, _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    _seen = Seen()
    try:
        yield _seen
    finally:
        _seen = None


SITE = """
import os, sys

def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind"):
        address = arguments[1] if event in ("socket.connect", "socket.bind") else arguments[0]
        if event.startswith("socket.get") or isinstance(address, tuple):  # a text: a socket of this machine's own
            with open(os.environ["SEEN"], "a") as file:
                file.write(f"{event} {address!r}\\n")

sys.addaudithook(hook)
with open(os.environ["SEEN"], "a") as file:
    file.write(f"started {os.getpid()}\\n")
"""
"""A sitecustomize.py, which every Python process reads at its start, workers too."""


def site_folder(folder: Path) -> dict[str, str]:
    """Write the hook into a folder; return the environment in which processes note what they do in `folder/seen`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    return {"PYTHONPATH": str(folder), "SEEN": str(folder / "seen")}
