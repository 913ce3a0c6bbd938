"""A real disk that fills up: a tmpfs in a mount namespace of its own, with the real command writing to it.

    unshare -m python tests/full_disk.py FOLDER checkpoint|export

Trains on a small disk, fills it when the moment has come, and prints as JSON how the run ended, what it left, and how
the same command ends when there is room again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lora_cli.manifest import sha256_of, verify

SIZE = 24 * 2**20
STEPS, SAVE = 600, 200
MOMENTS = {"checkpoint": f"step-{SAVE}", "export": f"step-{STEPS}"}
"""The checkpoint whose appearance is the sign to fill the disk: before the next save, or while it is scored."""


def train(recipe: Path, run: Path) -> subprocess.Popen[str]:
    """Start the real command."""
    call = "import sys; from lora_cli.cli import train_main; sys.exit(train_main())"
    return subprocess.Popen(
        [sys.executable, "-c", call, str(recipe), f"run.output={run}"], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


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


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a path is there."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.0005)


def state_of(run: Path) -> dict[str, Any]:
    """Return what is there under public names, each of which verifies, and what is hidden."""
    folders = [path for path in [*run.glob("checkpoints/step-*"), run / "adapter"] if path.is_dir()]
    for folder in folders:
        verify(folder)
    hidden = [path.name for path in run.rglob(".*") if path.name != ".lock"]
    return {"folders": sorted(path.name for path in folders), "hidden": hidden}


def main(folder: Path, moment: str) -> dict[str, Any]:
    """Run the whole story."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)], check=True)
    run = disk / "run"
    process = train(folder / "recipe.yaml", run)
    wait_for(run / "checkpoints" / MOMENTS[moment], process)
    filler = fill(disk)
    _, errors = process.communicate(timeout=100)
    told: dict[str, Any] = {"code": process.returncode, "errors": errors, **state_of(run)}
    filler.unlink()
    again = train(folder / "recipe.yaml", run)
    _, errors = again.communicate(timeout=100)
    told |= {"code again": again.returncode, "errors again": errors, "state again": state_of(run)}
    if again.returncode == 0:
        told["sha256"] = sha256_of(run / "adapter" / "adapter_model.safetensors")
    return told


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
