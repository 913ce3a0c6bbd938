"""Published folders changed on purpose, so that what is tested is not the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_cli.manifest import MANIFEST, write_manifest


def reseal(folder: Path, **facts: Any) -> None:
    """Make the manifest agree with what the folder holds now; `facts` replace those in it."""
    before = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    kept = {key: value for key, value in before.items() if key not in ("format_version", "sha256", "files")}
    write_manifest(folder, folder, kept | facts)
