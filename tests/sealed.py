"""Published folders changed on purpose, so that what is tested is not the manifest."""

from __future__ import annotations

import hashlib
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


def sign(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest of any content whose own checksum is right, as somebody who knows the format would."""
    unsigned = "0" * 64
    text = json.dumps({"sha256": unsigned} | manifest | {"sha256": unsigned})
    path.write_text(text.replace(unsigned, hashlib.sha256(text.encode()).hexdigest(), 1))
