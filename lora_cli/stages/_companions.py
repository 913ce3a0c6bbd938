"""What stands beside the weights in every exported folder: tokenizer, chat template, generation config, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.models.safety import MORE_TEMPLATES, TOKENIZER_FILES, leads_out
from lora_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Companions:
    """What an exported folder says of itself, and the files that its reader needs beside the weights."""

    base: Path
    """Lends its tokenizer's files, byte for byte, and its generation config."""
    base_name: str
    """What the adapter names as its base."""
    revision: str | None
    stop_ids: Sequence[int]
    card: str
    """The model card's text."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What joins the manifest."""
    tokenizer: Any | None = None
    """One that knows more tokens than the base's, in whose place it is written."""
    chat_template: str | None = None
    """What takes the place of the base's."""

    def write(self, folder: Path, notes: Sequence[str] = ()) -> None:
        """Write them into `folder`; `notes` are further paragraphs of the card."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        for name in TOKENIZER_FILES if self.tokenizer is None else ():
            if (self.base / name).is_file():
                shutil.copyfile(self.base / name, folder / name)
        if self.chat_template is not None:
            _replace_template(folder, self.chat_template)
        elif (self.base / MORE_TEMPLATES).is_dir():
            shutil.copytree(self.base / MORE_TEMPLATES, folder / MORE_TEMPLATES)
        # Its other settings stay as they are: transformers reads some that it refuses to write.
        source = self.base / "generation_config.json"
        settings = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
        # A reader that stops at another token than the one that was trained would never stop.
        settings["eos_token_id"] = list(self.stop_ids) if len(self.stop_ids) > 1 else self.stop_ids[0]
        (folder / source.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        card = "\n\n".join([self.card, *notes]).rstrip("\n") + "\n"
        (folder / "README.md").write_text(card, encoding="utf-8")


def name_of_base(recipe: Recipe, base: Path) -> str:
    """Return what an adapter names as its base: PEFT finds a hub id as it is, or a local folder's absolute path."""
    local = recipe.model.base == "tiny" or Path(recipe.model.base).expanduser().exists()
    return str(base.resolve()) if local else recipe.model.base


def card_of(adapter: Path, form: str) -> str:
    """Return the card of an adapter that is written again as `form`, or a title where it has none of its own."""
    card = adapter / "README.md"
    # A link could publish any file of this machine.
    if card.is_file() and not leads_out(card, adapter):
        return card.read_text(encoding="utf-8")
    return f"# {adapter.name}, {form}\n"


def _replace_template(folder: Path, chat_template: str) -> None:
    """Make a template the only one of an exported tokenizer."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.pop("chat_template", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
