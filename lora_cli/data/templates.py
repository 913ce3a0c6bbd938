"""`data.template`: one of our chat templates or a file of the user's, put in the place of the tokenizer's own.

The tokenizer is copied, never changed. What is exported carries the template, so inference renders what training did:
`lora-eval` and `lora-merge` of an adapter therefore use the template that lies beside it.

One of ours begins with the begin token where the tokenizer puts one before a text by itself. A template whose turns are
held apart by control tokens needs a tokenizer that has them: as plain text they would be many tokens that the model has
never seen in this place. alpaca, vicuna and mistral do without, and end an answer with the end token.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lora_cli.data.sandbox import ChatTemplate
from lora_cli.data.special import added_bos, probe
from lora_cli.errors import InputError
from lora_cli.models.safety import leads_out
from lora_cli.models.weight_files import read_json
from lora_cli.recipe.data_block import CHOICES, is_template_file

FILE = "chat_template.jinja"
"""Where transformers looks for a tokenizer's chat template."""
MAX_BYTES = 1_000_000

_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "templates"
_BEGIN = "{{- bos_token -}}\n"
"""First line of each of ours."""
_CONTROLS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_template(wanted: str) -> str:
    """Return the text that a value of data.template stands for: one of ours, or a file.

    Raises:
        InputError: the file cannot be read, or is no text.
    """
    if not is_template_file(wanted):
        return (_FOLDER / f"{wanted}.jinja").read_text(encoding="utf-8")
    place = f"data.template: {wanted}"
    try:
        path = Path(wanted).expanduser()
        if path.exists() and not path.is_file():
            raise InputError(f"{place}: is not a file (name a Jinja template)")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of no user
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{place}: cannot be read: {reason}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{place}: larger than {MAX_BYTES // 1_000_000} MB (is it a template?)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: is not UTF-8 at byte {error.start} (convert it)") from None
    if not text.strip():
        raise InputError(f"{place}: is empty (name a Jinja template)")
    return text.replace("\r\n", "\n")


def with_template(tokenizer: Any, wanted: str, adapter: Path | None = None) -> Any:
    """Return the tokenizer with the chat template of data.template: a copy, if that is not its own.

    `adapter` is the folder of an adapter that is evaluated or merged: its template is taken for the model's, and in
    place of a file that is no longer there.

    Raises:
        InputError: the file cannot be read, the adapter's leads out of its folder, or the tokenizer lacks control
            tokens of the template.
    """
    beside = adapter / FILE if adapter is not None and (adapter / FILE).is_file() else None
    if adapter is not None and beside is not None and leads_out(beside, adapter):
        raise InputError(
            f"{beside}: is a link out of the folder, and would be copied into what is merged (copy it)"
        )
    if wanted == "plain":
        return tokenizer
    if beside is not None and (
        wanted in CHOICES or (is_template_file(wanted) and not Path(wanted).expanduser().exists())
    ):
        text = beside.read_text(encoding="utf-8")
    elif wanted in CHOICES:
        return tokenizer
    else:
        text = read_template(wanted)
        refuse_missing(wanted, {token.content for token in tokenizer.added_tokens_decoder.values()})
        if not is_template_file(wanted) and added_bos(tokenizer) is None:
            text = text.removeprefix(_BEGIN)
    own = tokenizer.chat_template
    if text == (own.get("default") if isinstance(own, dict) else own):
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = text
    return changed


def refuse_missing(wanted: str, known: Collection[str]) -> None:
    """Refuse one of our templates for a tokenizer whose added tokens are `known`.

    Raises:
        InputError: control tokens of the template are not among them.
    """
    missing = [token for token in _CONTROLS.get(wanted, ()) if token not in known]
    if missing:
        raise InputError(
            f"data.template: {wanted}: the tokenizer lacks its control token{'s' if len(missing) > 1 else ''}"
            f" {', '.join(missing)} (use alpaca, vicuna, or the model's own template)"
        )


def check_template(wanted: str, base: Path | None) -> str | None:
    """Compile and try a template with nothing but JSON files read; return what was checked, None if nothing was.

    `base` is the model's folder, None where it is not at hand.

    Raises:
        InputError: there is none, it is not valid or safe, or needs control tokens that the tokenizer lacks.
    """
    config = _tokenizer_config(base)
    if wanted in CHOICES:
        source = _own_template(base, config)
        if source is None or wanted == "plain":
            return None
        name = f"model.base: {FILE}"
    else:
        source, name = read_template(wanted), f"data.template: {wanted}"
    if base is not None and wanted in _CONTROLS:
        refuse_missing(wanted, set(_added_tokens(base, config)))
    # Tokens of a base that is not at hand do not matter here: a stand-in shows the same faults.
    tokens = {"bos_token": "<s>", "eos_token": "</s>"} if base is None else _named_tokens(config)
    probe(ChatTemplate(source, name, tokens))
    return f"{name}: renders a conversation"


def _tokenizer_config(base: Path | None) -> dict[str, Any]:
    path = base / "tokenizer_config.json" if base is not None else None
    return read_json(path) if path is not None and path.is_file() else {}


def _own_template(base: Path | None, config: dict[str, Any]) -> str | None:
    if base is None:
        return None
    if (base / FILE).is_file():
        return (base / FILE).read_text(encoding="utf-8", errors="replace")
    found = config.get("chat_template")
    if isinstance(found, list):  # several of them, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {name: config.get(name) for name in _NAMED_TOKENS}
    texts = {name: one.get("content") if isinstance(one, dict) else one for name, one in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _added_tokens(base: Path, config: dict[str, Any]) -> Iterator[str]:
    yield from (
        str(token.get("content")) for token in read_json(base / "tokenizer.json").get("added_tokens", [])
    )
    yield from _named_tokens(config).values()
    for token in (config.get("added_tokens_decoder") or {}).values():
        yield str(token.get("content"))
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for token in extra.values() if isinstance(extra, dict) else extra:
        yield str(token.get("content") if isinstance(token, dict) else token)
    if (base / "added_tokens.json").is_file():
        yield from read_json(base / "added_tokens.json")
