"""Characters that a tokenizer has no token for, found by `lora data`."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import write_rows
from weightless import describe, tokenizer_of, write_word_base

QUESTION, ANSWER = "what does the cat say", "the cat says purr"


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_unknown_characters_are_counted_and_named(
    tmp_path: Path, byte_fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Characters without a token are found as transformers encodes them: as the unknown token, or as bytes."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base = write_word_base(tmp_path / "base", byte_fallback=byte_fallback)
    content = [{"prompt": QUESTION, "completion": ANSWER}, {"prompt": QUESTION, "completion": f"{ANSWER} 京"}]
    path = write_rows(tmp_path / "rows.jsonl", content)
    unknown = describe(base, f"data.train={path}")["splits"]["train"]["unknown"]
    ids = tokenizer_of(base)("京", add_special_tokens=False)["input_ids"]
    pieces = tokenizer_of(base).convert_ids_to_tokens(ids)
    assert unknown["tokens"] == pieces.count("<unk>") == (0 if byte_fallback else 1)
    assert unknown["byte_tokens"] == sum(piece.startswith("<0x") for piece in pieces)
    assert unknown["byte_tokens"] == (3 if byte_fallback else 0)
    assert (unknown["rows"], unknown["first"], unknown["characters"]) == (1, f"{path}:2", ["京"])
