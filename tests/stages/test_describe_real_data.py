"""The real data files, described: formats, counts and trained text are those of the files themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from weightless import describe, recount, tokenizer_of, turns_of, write_base

REAL = {
    "gsm8k.test.jsonl": ("fields", "conversations"),
    "alpaca_en_demo.json": ("alpaca", "conversations"),
    "dpo_en_demo.json": ("sharegpt_preference", "preference pairs"),
    "wiki_demo.txt": ("text", "texts"),
}
FIELDS = 'data.fields={prompt: "{question}", completion: "{answer}"}'


@pytest.mark.parametrize("name", REAL)
def test_real_data_is_shown_right(
    name: str, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real files load by detection or a mapping, and counts and trained text are those of the file itself."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base, path, most = write_base(tmp_path / "base"), shared_data / name, 60
    overrides = [f"data.train={path}", f"data.max_train_rows={most}", "data.max_length=100000"]
    overrides += [FIELDS] if name.startswith("gsm8k") else []
    said = describe(base, *overrides, show=2)
    (source,) = said["sources"]
    assert (source["format"], source["kind"]) == REAL[name]
    tokenizer, shown = tokenizer_of(base), said["rows"][1]["sides"]
    text = path.read_text(encoding="utf-8")
    trained = [tokenizer.decode([one["id"] for one in side["tokens"] if one["trained"]]) for side in shown]
    if name.endswith(".txt"):
        documents = [line for line in text.splitlines() if line.strip()]
        assert source["counts"]["kept"] == len(documents)
        whole = tokenizer.decode([one["id"] for one in shown[0]["tokens"]])
        assert whole == documents[1] + "<|im_end|>"
        return
    content = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    assert source["counts"]["kept"] == most
    if name.startswith("dpo"):
        assert trained == [content[1][side]["value"] + "<|im_end|>" for side in ("chosen", "rejected")]
        return
    answer = "answer" if name.startswith("gsm8k") else "output"
    assert trained == [content[1][answer] + "<|im_end|>"]
    counted = [recount(tokenizer, turns_of(_prompt(row), row[answer])) for row in content[:most]]
    split = said["splits"]["train"]
    assert (split["tokens"], split["trained_tokens"]) == tuple(map(sum, zip(*counted, strict=True)))


def _prompt(row: dict[str, str]) -> str:
    if "question" in row:
        return row["question"]
    return row["instruction"] + (f"\n\n{row['input']}" if row["input"].strip() else "")
