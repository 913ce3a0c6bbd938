"""What every data format must keep, over every format there is: read, detected, rendered, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import write_rows, write_tokenizer
from transformers import AutoTokenizer

from lora_cli.data.formats import FORMATS
from lora_cli.errors import InputError
from lora_cli.recipe import schema
from lora_cli.runtime.dist import Runtime
from lora_cli.stages import prepare
from lora_cli.types import Conversation, Labelled, Pair, Text

QUESTION, ANSWER = "what does the cat say", "the cat says purr"
SAMPLES: dict[str, dict[str, Any]] = {
    "text": {"text": ANSWER},
    "prompt_completion": {"prompt": QUESTION, "completion": ANSWER},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "chat": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "preference": {"prompt": QUESTION, "chosen": ANSWER, "rejected": "meow"},
    "sharegpt_preference": {
        "conversations": [{"from": "human", "value": QUESTION}],
        "chosen": {"from": "gpt", "value": ANSWER},
        "rejected": {"from": "gpt", "value": "meow"},
    },
    "labelled": {"prompt": QUESTION, "completion": ANSWER, "label": True},
}
ALL_KINDS = (Conversation, Text, Pair, Labelled)
"""One row per format; a format without one fails `test_every_format_is_covered`."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a fast tokenizer with a ChatML template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


pytestmark = pytest.mark.usefixtures("own_cache")


def test_every_format_is_covered() -> None:
    """Every function in the table of formats is in this contract, and in the recipe's schema."""
    assert set(SAMPLES) == set(FORMATS)
    offered = schema.Data.model_json_schema()["properties"]["format"]["enum"]
    assert set(offered) == {"auto", *FORMATS}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_row_is_detected_and_its_answer_trained(
    name: str, suffix: str, tmp_path: Path, tokenizer: Any
) -> None:
    """A format is detected and named in the log; exactly the answer and its terminator are trained."""
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write_rows(path, [SAMPLES[name]] * 3)
    else:
        path.write_text(json.dumps([SAMPLES[name]] * 3))
    lines: list[str] = []
    prepared = prepare.run(
        schema.Data(train=str(path)), "assistant", tokenizer, Runtime(torch.device("cpu")), lines.append,
        consumes=ALL_KINDS,
    )  # fmt: skip
    assert prepared.formats == {"train": name}
    assert f"{name} (detected)" in lines[0]
    assert prepared.train is not None
    assert len(prepared.train) == 3 * (2 if "preference" in name else 1)
    example = prepared.train[0]
    trained = tokenizer.decode(example.input_ids[example.trained])
    whole = tokenizer.decode(example.input_ids)
    assert whole.endswith(trained) or whole.endswith(trained + "\n")
    if name == "text":
        assert example.trained[1:].all()
    else:
        assert trained == ANSWER + "<|im_end|>"


@pytest.mark.parametrize("name", SAMPLES)
def test_a_missing_column_is_named(name: str, tmp_path: Path, tokenizer: Any) -> None:
    """A row that lacks a required column stops with its file:line and the column's name, and leaves no cache."""
    column = next(iter(SAMPLES[name]))
    broken = {key: value for key, value in SAMPLES[name].items() if key != column} | {"other": "x"}
    path = write_rows(tmp_path / "rows.jsonl", [SAMPLES[name], broken])
    with pytest.raises(InputError) as caught:
        prepare.run(
            schema.Data(train=str(path), format=name),  # type: ignore[arg-type]
            "assistant",
            tokenizer,
            Runtime(torch.device("cpu")),
            print,
            consumes=ALL_KINDS,
        )
    assert "rows.jsonl:2" in str(caught.value)
    assert column in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.bin"))
