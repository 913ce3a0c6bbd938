"""What `lora data` says is what is there: every number counted again by other means, every fault found and placed."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import rows, write_rows
from weightless import (
    describe,
    finding,
    recount,
    tokenizer_of,
    turns_of,
    write_base,
)

from lora_cli.errors import InputError
from lora_cli.objectives._base import pad_batches
from lora_cli.objectives._packing import pack_batches
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime import order
from lora_cli.runtime.dist import Runtime
from lora_cli.stages import prepare
from lora_cli.stages.describe import histogram
from lora_cli.types import Example

QUESTION, ANSWER = "what does the cat say", "the cat says purr"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base without weights that no test changes."""
    return write_base(tmp_path_factory.mktemp("models") / "base")


pytestmark = pytest.mark.usefixtures("own_cache")


def test_counts_are_those_of_transformers(base: Path, tmp_path: Path) -> None:
    """Tokens, trained tokens, lengths and histogram equal an independent count over the same rows."""
    content = rows(60)
    path = write_rows(tmp_path / "rows.jsonl", content)
    said = describe(base, f"data.train={path}")
    tokenizer = tokenizer_of(base)
    counts = [recount(tokenizer, turns_of(row["prompt"], row["completion"])) for row in content]
    lengths, trained = (np.array(one) for one in zip(*counts, strict=True))
    split = said["splits"]["train"]
    assert (split["rows"], split["tokens"], split["trained_tokens"]) == (60, lengths.sum(), trained.sum())
    assert said["sources"][0]["counts"]["tokens"] == lengths.sum()
    assert said["sources"][0]["longest"] == lengths.max()
    for key, values in (("lengths", lengths), ("trained", trained)):
        assert [split[key][name] for name in ("min", "median", "max")] == [
            values.min(), np.median(values), values.max()
        ]  # fmt: skip
    assert sum(split["histogram"]["tokens"]) == sum(split["histogram"]["trained"]) == 60
    longest = int(np.argmax(lengths))
    assert split["longest"][0] == {
        "where": f"{path}:{longest + 1}", "tokens": lengths[longest], "trained": trained[longest]
    }  # fmt: skip


@pytest.mark.parametrize("batch_size", [7, 32])
@pytest.mark.parametrize("tokens", ["64", "auto"])
def test_padding_is_that_of_the_collator(base: Path, tmp_path: Path, batch_size: int, tokens: str) -> None:
    """Steps, passes and padding equal those of the batches that training makes of the first epoch."""
    path = write_rows(tmp_path / "rows.jsonl", rows(50))
    overrides = [f"data.train={path}", f"train.batch_size={batch_size}", f"train.micro_batch_tokens={tokens}"]
    epoch = describe(base, *overrides, "run.seed=3")["epoch"]
    recipe = load_recipe(None, overrides)
    prepared = prepare.run(
        recipe.data, "assistant", tokenizer_of(base), Runtime(torch.device("cpu")), lambda _: None
    )
    train, device = prepared.train, torch.device("cpu")
    assert train is not None

    def rows_of(step: int) -> list[tuple[int, Example]]:
        mine = order.rows_of_step(step, num_rows=50, batch_size=batch_size, seed=3)
        return [(row, train[row]) for row in mine]

    batches = [
        batch
        for step in range(order.steps_per_epoch(50, batch_size))
        for batch in pad_batches(
            rows_of(step), tokens=epoch["pass_tokens"], pad_id=prepared.pad_id, device=device
        )
    ]
    real = sum(int(batch.attention_mask.sum()) for batch in batches)
    padded = sum(batch.input_ids.numel() for batch in batches)
    assert epoch["pass_tokens"] == (64 if tokens == "64" else 4096)
    assert epoch["steps"] == -(-50 // batch_size)
    assert (epoch["padded"]["passes"], epoch["tokens"]) == (len(batches), real)
    assert epoch["padded"]["padding"] == pytest.approx(1 - real / padded, abs=1e-4)
    packed = [
        batch
        for step in range(epoch["steps"])
        for batch in pack_batches(rows_of(step), tokens=epoch["pass_tokens"], device=torch.device("cpu"))
    ]
    assert epoch["packed"]["passes"] == len(packed)
    room = len(packed) * epoch["pass_tokens"]
    assert epoch["packed"]["filled"] == pytest.approx(
        sum(int(train.lengths[row]) for batch in packed for row in batch.rows) / room, abs=1e-4
    )
    assert describe(base, *overrides, "run.seed=3", "data.packing=false")["epoch"]["packed"] is None


@pytest.mark.parametrize(("most", "step"), [(1, 1), (9, 1), (37, 5), (513, 50), (100_000, 10_000)])
def test_every_row_is_in_one_bin(most: int, step: int) -> None:
    """Whatever the lengths, the counts of a histogram add up to the rows, and its edges rise."""
    generator = np.random.Generator(np.random.PCG64(most))
    lengths = generator.integers(1, most + 1, 997)
    found = histogram(lengths, np.maximum(lengths - 1, 1))
    assert sum(found["tokens"]) == sum(found["trained"]) == 997
    assert found["edges"] == sorted(set(found["edges"]))
    assert found["edges"][1] - found["edges"][0] == step
    assert len(found["tokens"]) <= 14


def test_duplicates_and_overlap_are_those_of_the_rows(base: Path, tmp_path: Path) -> None:
    """Rows that say what an earlier one says are counted as plain Python counts them, and the first is placed."""
    content = [
        {"prompt": f"q{index}", "completion": "a"} for index in (0, 1, 2, 1, 0, 0, *range(200, 500), 200)
    ]
    train = write_rows(tmp_path / "train.jsonl", content)
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": f"q{i}", "completion": "a"} for i in (9, 2, 450)])
    said = describe(base, f"data.train={train}", f"data.eval={held}")
    again = len(content) - len(Counter(row["prompt"] for row in content))
    twins = said["splits"]["train"]["duplicates"]
    assert (twins["rows"], twins["of"]) == (again, len(content)) == (4, 307)
    assert (twins["first"], twins["repeats"]) == (f"{train}:4", f"{train}:2")
    assert said["overlap"] == {"rows": 2, "of": 3, "first": f"{held}:2", "repeats": f"{train}:3"}
    assert finding(said, "duplicates")["level"] == "warning"  # 1.3 %
    assert finding(said, "overlap")["where"] == f"{held}:2 is {train}:3"


def test_what_became_of_rows_has_a_number_and_a_place(base: Path, tmp_path: Path) -> None:
    """Bad, over-long and untrained rows are counted with their reason, and the first of each is named."""
    content: list[Any] = [{"messages": turns_of(QUESTION, ANSWER)} for _ in range(40)]
    content[4] = {"messages": turns_of(QUESTION, ANSWER + " and so on" * 50)}
    content[9] = {"messages": [turns_of(QUESTION, ANSWER)[0], {**turns_of("", ANSWER)[1], "train": False}]}
    content[11] = {"messages": "none"}
    path = write_rows(tmp_path / "rows.jsonl", content)
    overrides = ["data.max_length=64", "data.on_bad_row=skip", "data.max_bad_rows=0.1"]
    said = describe(base, f"data.train={path}", *overrides)
    (source,) = said["sources"]
    assert (source["counts"]["kept"], source["too_long"], source["untrained"]) == (37, 1, 1)
    assert (source["counts"]["bad"], source["counts"]["rows"]) == (1, 39)
    assert source["firsts"] == {name: f"{path}:{line}" for name, line in _FIRSTS}
    assert source["counts"]["lost_trained_tokens"] > 50
    for name, line in (("too_long", 5), ("untrained", 10), ("bad_rows", 12)):
        found = finding(said, name)
        assert found["level"] == "warning"
        assert found["number"] == 1
        assert f"{path}:{line}" in found["where"]


_FIRSTS = (("too_long", 5), ("untrained", 10), ("longest", 5))


def test_a_place_is_right_in_every_part_of_a_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file is tokenized in parts, the first over-long row is named by its line in the file."""
    monkeypatch.setattr("lora_cli.data.tokenize.PART_BYTES", 500)
    monkeypatch.setattr(
        "os.sched_getaffinity", lambda _: {0}, raising=False
    )  # no pool: it takes seconds to start
    content = rows(60)
    content[44]["completion"] = "purr " * 200
    path = write_rows(tmp_path / "rows.jsonl", content)
    said = describe(base, f"data.train={path}", "data.max_length=128", rows=(f"{path}:46",))
    assert said["sources"][0]["firsts"] == {"too_long": f"{path}:45", "longest": f"{path}:45"}
    assert said["rows"][0]["where"] == f"{path}:46"
    with pytest.raises(InputError, match=r"rows\.jsonl:45: no row that is used"):
        describe(base, f"data.train={path}", "data.max_length=128", rows=("rows.jsonl:45",))
    with pytest.raises(InputError, match=r"its files are .*rows\.jsonl"):
        describe(base, f"data.train={path}", rows=("other.jsonl:1",))


def test_rows_without_terminator_are_counted(base: Path, tmp_path: Path) -> None:
    """Rows cut at the right lose the terminator, and a warning says how many; whole ones keep it."""
    long = {"prompt": QUESTION, "completion": ANSWER + " and so on" * 50}
    path = write_rows(tmp_path / "rows.jsonl", [*rows(8), long, long])
    said = describe(base, f"data.train={path}", "data.max_length=64", "data.overlong=truncate_right")
    assert finding(said, "no_terminator")["number"] == 2
    assert finding(said, "no_terminator")["where"] == f"{path}:9"
    assert finding(said, "truncated")["number"] == 2
    assert describe(base, f"data.train={path}")["splits"]["train"]["without_terminator"]["rows"] == 0


def test_rows_shown_are_what_the_collator_feeds(base: Path, tmp_path: Path) -> None:
    """The ids are those of transformers' own rendering, the texts join to its text, and the answer alone is trained."""
    turns = turns_of("naïve café 😀\n\n  東京 <|im_end|>x", "the cat\nsays  purr")
    path = write_rows(
        tmp_path / "rows.jsonl", [{"messages": turns_of(QUESTION, ANSWER)}, {"messages": turns}]
    )
    (first, second) = describe(base, f"data.train={path}", show=5)["rows"]
    tokenizer = tokenizer_of(base)
    ids = tokenizer.apply_chat_template(turns_of(QUESTION, ANSWER), tokenize=True, return_dict=False)
    tokens = first["sides"][0]["tokens"]
    assert [token["id"] for token in tokens] == ids
    for row, given in ((first, turns_of(QUESTION, ANSWER)), (second, turns)):
        tokens = row["sides"][0]["tokens"]
        trained = [token["id"] for token in tokens if token["trained"]]
        assert tokenizer.decode(trained) == given[-1]["content"] + "<|im_end|>"
        whole = "".join(token["text"] for token in tokens)
        # A token that is a part of a character is written by its bytes.
        raw = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), whole.encode())
        assert raw.decode() == tokenizer.decode([token["id"] for token in tokens])
    assert [row["where"] for row in (first, second)] == [f"{path}:1", f"{path}:2"]
    controls = [token["text"] for token in second["sides"][0]["tokens"] if token["control"]]
    assert controls == ["<|im_start|>", "<|im_end|>"] * 2  # what the user typed is text


def test_pairs_are_shown_beside_each_other(base: Path, tmp_path: Path) -> None:
    """A pair has a chosen and a rejected side, is no duplicate of itself, and no objective is said to train on it."""
    content = [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
    path = write_rows(tmp_path / "rows.jsonl", content)
    said = describe(base, f"data.train={path}", "data.max_train_rows=4", show=3)
    split, tokenizer = said["splits"]["train"], tokenizer_of(base)
    assert (split["rows"], split["pairs"], split["duplicates"]["rows"]) == (8, 4, 0)
    assert said["epoch"] is None
    assert finding(said, "not_consumed")["level"] == "warning"
    same = describe(
        base, f"data.train={path}", f"data.eval={write_rows(tmp_path / 'held.jsonl', content[3:])}"
    )
    assert (same["overlap"]["rows"], same["overlap"]["of"]) == (2, 2)
    for index, row in enumerate(said["rows"]):
        trained = {
            side["name"]: tokenizer.decode([token["id"] for token in side["tokens"] if token["trained"]])
            for side in row["sides"]
        }
        assert trained == {"chosen": f"good {index}<|im_end|>", "rejected": f"bad {index}<|im_end|>"}
        assert row["where"] == f"{path}:{index + 1}"


def test_labels_are_shown(base: Path, tmp_path: Path) -> None:
    """A labelled answer is shown with its label, also where all rows stand on one line."""
    content = [{"prompt": "q", "completion": f"a {i}", "label": i % 2 == 0} for i in range(4)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content))
    shown = describe(base, f"data.train={path}", rows=("rows.json:1",))["rows"]
    assert [row["wanted"] for row in shown] == [True, False, True, False]


def test_limits_of_the_model_are_held_against_the_rows(tmp_path: Path) -> None:
    """Rows longer than the model's positions are a warning, although nothing is loaded."""
    base = write_base(tmp_path / "short", positions=16)
    path = write_rows(tmp_path / "rows.jsonl", rows(8))
    assert finding(describe(base, f"data.train={path}"), "beyond_positions")["remedy"] == "data.max_length=16"


def test_tokens_of_the_recipe_are_known(base: Path, tmp_path: Path) -> None:
    """New tokens are tokens as in training, the vocabulary grows by them, and one that no row holds is a warning."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": QUESTION, "completion": f"<tool>{ANSWER}"}] * 2)
    said = describe(base, f"data.train={path}", "adapter.add_tokens=[<tool>]", show=1)
    assert [token["text"] for token in said["rows"][0]["sides"][0]["tokens"]].count("<tool>") == 1
    assert not [one for one in said["findings"] if one["name"] in ("beyond_vocabulary", "refused")]
    said = describe(base, f"data.train={path}", "adapter.add_tokens=[<other>]")
    assert "<other>" in finding(said, "refused")["what"]


def test_sources_are_counted_apart(base: Path, tmp_path: Path) -> None:
    """Each source of a mixture has its counts, its share of the epoch, and how often its rows are repeated."""
    many = write_rows(tmp_path / "many.jsonl", [{"prompt": f"q{i}", "completion": "a"} for i in range(30)])
    few = tmp_path / "few.txt.gz"
    few.write_bytes(gzip.compress(b"one text\nand another\n"))
    sources = f"{{many: {{path: {many}, weight: 1}}, few: {{path: {few}, weight: 1}}}}"
    said = describe(base, f"data.sources={sources}", "data.max_length=64")
    found = {source["key"]: source for source in said["sources"]}
    assert found["data.sources.many"]["epoch_rows"] == found["data.sources.few"]["epoch_rows"] == 16
    assert found["data.sources.few"]["epoch_repeats"] == 8.0
    assert [source["kind"] for source in said["sources"]] == ["conversations", "texts"]
    assert finding(said, "repeated")["number"] == 16
    assert said["splits"]["train"]["duplicates"]["rows"] == 0


def test_a_second_description_reads_the_cache(base: Path, tmp_path: Path) -> None:
    """Nothing is tokenized twice, and what is said is the same."""
    path = write_rows(tmp_path / "rows.jsonl", rows(20))
    first = describe(base, f"data.train={path}", "data.eval_fraction=0.2", show=2)
    made = {one: one.stat().st_mtime_ns for one in (tmp_path / "cache").rglob("*")}
    second = describe(base, f"data.train={path}", "data.eval_fraction=0.2", show=2)
    assert first == second
    assert {one: one.stat().st_mtime_ns for one in (tmp_path / "cache").rglob("*")} == made
    assert first["splits"]["train"]["rows"] + first["splits"]["eval"]["rows"] == 20
