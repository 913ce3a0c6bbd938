"""A real disk that fills up: a tmpfs in a mount namespace of its own, with the real command writing to it.

    unshare -m python tests/full_disk.py FOLDER

Trains FOLDER/recipe.yaml on a small disk, stopped where its writer has made the folder of the second checkpoint, fills
the disk, and lets it go on; then another run, stopped before its export; and a third, whose checkpoints become
read-only. Prints as JSON how each ended, what it left, and how the same command ended when there was room again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from forked_commands import ended, start, warm

SIZE = 8 * 2**20
TARGETS = {"checkpoint": "step-4", "export": "adapter", "read-only": "step-4"}


def fill(disk: Path) -> Path:
    """Write until nothing more fits, and return the file."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            while True:
                try:
                    file.write(bytes(size))
                except OSError:
                    break
    return path


def forbid(folder: Path) -> None:
    """Make a folder read-only, for root as well, by mounting it over itself."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


def state_of(run: Path) -> dict[str, Any]:
    """Return what is there under public names, each of which verifies, and what is hidden."""
    from lora_cli.manifest import verify

    folders = [path for path in [*run.glob("checkpoints/step-*"), run / "adapter"] if path.is_dir()]
    for folder in folders:
        verify(folder)
    hidden = [path.name for path in run.rglob(".*") if path.name != ".lock"]
    return {"folders": sorted(path.name for path in folders), "hidden": hidden}


def story(folder: Path, disk: Path, moment: str) -> dict[str, Any]:
    """Run the command until the disk is full, and again when it is not."""
    from lora_cli.manifest import sha256_of

    run = disk / moment
    failpoint = {"LORA_FAILPOINT": f"folder-made:stop:{TARGETS[moment]}"}
    order: dict[str, Any] = {"folder": str(folder), "environment": failpoint, "file_bytes": None, "clock": 0}
    order["arguments"] = ["train", str(folder / "recipe.yaml"), f"run.output={run}"]
    pid = start(order)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), (folder / "errors").read_text()
    filler = forbid(run / "checkpoints") if moment == "read-only" else fill(disk)
    os.kill(pid, signal.SIGCONT)
    told: dict[str, Any] = {"code": ended(pid), "errors": (folder / "errors").read_text(), **state_of(run)}
    if filler is None:
        subprocess.run(["umount", str(run / "checkpoints")], check=True)
    else:
        filler.unlink()
    order["environment"] = {}
    told |= {"code again": ended(start(order)), "errors again": (folder / "errors").read_text()}
    told["state again"] = state_of(run)
    if told["code again"] == 0:
        told["sha256"] = sha256_of(run / "adapter" / "adapter_model.safetensors")
    return told


if __name__ == "__main__":
    warm()
    place = Path(sys.argv[1])
    disk = place / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)], check=True)
    print(json.dumps({moment: story(place, disk, moment) for moment in TARGETS}))
