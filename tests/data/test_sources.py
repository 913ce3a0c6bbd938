"""Where rows come from: many files, parts, weights, rows held out; read the same whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_rows import lines_of, places, run, texts, write

from lora_cli.data import hub
from lora_cli.data.dataset import mix
from lora_cli.data.head import check_head
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Data
from lora_cli.stages import prepare
from lora_cli.types import Pair

np = pytest.importorskip("numpy")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test has its own cache folder, in which no hidden folder may be left."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "tokens"
    assert not list((tmp_path / "cache" / "tokens").glob(".*"))


@pytest.fixture
def tokenizer(make_tokenizer: Any) -> Any:
    """A tokenizer with a ChatML template."""
    return make_tokenizer("chatml")


def test_folders_patterns_and_lists_in_a_stated_order(tmp_path, tokenizer):
    """A folder and a pattern give their files by name, a list in its order; hidden and other files are left out."""
    folder = tmp_path / "rows"
    for name, said in (("b.jsonl", "b"), ("a.jsonl", "a"), ("sub/c.jsonl", "c"), (".cache/d.jsonl", "d")):
        write(folder / name, [said])
    (folder / "e.txt").write_text("e\n")
    (folder / "README.md").write_text("no rows")
    ways = {
        str(folder): "abec",
        str(folder / "*.jsonl"): "ab",
        str(folder / "**" / "*.jsonl"): "abc",
        str(folder / "?.txt"): "e",
    }
    for way, expected in ways.items():
        assert "".join(texts(tokenizer, run(tokenizer, train=way)[0].train)) == expected
    several = [str(folder / "sub"), str(folder / "b.jsonl"), str(folder / "a.jsonl")]
    train = run(tokenizer, train=several)[0].train
    assert texts(tokenizer, train) == ["c", "b", "a"]
    assert places(train)[1] == f"{folder / 'b.jsonl'}:1"


@pytest.mark.parametrize(("ending", "compression"), [("gz", "gzip"), ("zst", "zstd")])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_compressed_files_read_as_what_they_hold(tmp_path, tokenizer, kind, ending, compression):
    """The .gz and .zst of each text format give the rows and lines of the file itself."""
    content = {
        "jsonl": lines_of(["a", "b"]),
        "json": b'[{"text": "a"},\n{"text": "b"}]',
        "csv": b'n,text\n1,a\n2,"b"\n',
        "txt": b"a\n\nb\n",
    }[kind]
    plain, packed = tmp_path / f"rows.{kind}", tmp_path / f"rows.{kind}.{ending}"
    plain.write_bytes(content)
    with pa.output_stream(str(packed), compression=compression) as file:
        file.write(content)
    one, other = (run(tokenizer, train=str(path))[0].train for path in (plain, packed))
    assert texts(tokenizer, other) == texts(tokenizer, one) == ["a", "b"]
    assert [place.rpartition(":")[2] for place in places(other)] == [
        place.rpartition(":")[2] for place in places(one)
    ]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    data=st.data(),
)
def test_shares_are_exact(sizes, data):
    """By weight, each source has its share of the sum of all rows, rounded, and no row more than one beside another."""
    weights = data.draw(
        st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)), label="weights"
    )
    sources = [np.arange(size) + 1000 * index for index, size in enumerate(sizes)]
    chosen = mix(sources, weights)
    counts = Counter((chosen // 1000).tolist())
    total = sum(sizes)
    for index, weight in enumerate(weights):
        assert abs(counts[index] - total * weight / sum(weights)) <= 1
        own = Counter(chosen[chosen // 1000 == index].tolist())
        assert max(own.values()) - min(own.values()) <= (1 if counts[index] > sizes[index] else 0)
    assert total <= len(chosen) <= total + len(sizes)
    np.testing.assert_array_equal(chosen, mix(sources, weights))


def test_named_sources_are_mixed_by_weight(tmp_path, tokenizer):
    """100 and 20 rows at weights 1 to 3 make an epoch of 30 and 90; the same in every run, with counts for each."""
    sources = {
        "big": {"path": write(tmp_path / "big.jsonl", [f"b{row}" for row in range(100)]), "weight": 1},
        "small": {"path": write(tmp_path / "small.jsonl", [f"s{row}" for row in range(20)]), "weight": 3},
    }
    prepared, said = run(tokenizer, sources=sources)
    found = texts(tokenizer, prepared.train)
    assert Counter(one[0] for one in found) == {"b": 30, "s": 90}
    assert len({one for one in found if one[0] == "b"}) == 30
    assert sorted(Counter(one for one in found if one[0] == "s").values()) == [4] * 10 + [5] * 10
    again = run(tokenizer, sources=sources)[0]
    assert again.train.fingerprint == prepared.train.fingerprint
    assert {name: counts.rows for name, counts in prepared.counts.items()} == {
        "sources.big": 100,
        "sources.small": 20,
    }
    assert [line.split(":")[0] for line in said] == ["data.sources.big", "data.sources.small"]
    sources["big"]["max_rows"] = 10
    assert len(run(tokenizer, sources=sources)[0].train) == 30


def test_the_first_rows_of_several_files(tmp_path, tokenizer):
    """max_train_rows counts through the files in order; a pair is one row, and so is a text that was split."""
    for index in range(3):
        write(tmp_path / "rows" / f"{index}.jsonl", [f"{index}{row}" for row in range(4)])
    train = run(tokenizer, train=str(tmp_path / "rows"), max_train_rows=6)[0].train
    assert texts(tokenizer, train) == ["00", "01", "02", "03", "10", "11"]
    long = write(tmp_path / "long.jsonl", ["a b " * 20, "never"])
    split = run(tokenizer, train=long, max_train_rows=1, max_length=8, overlong="split")[0].train
    assert "".join(texts(tokenizer, split)) == "a b " * 20
    pairs = [{"prompt": f"q{row}", "chosen": f"yes{row}", "rejected": f"no{row}"} for row in range(3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in pairs))
    two = run(tokenizer, train=str(path), max_train_rows=2, consumes=(Pair,))[0].train
    both = [answer for row in range(len(two)) for answer in two[row].answers()]
    answers = [tokenizer.decode(one.input_ids[one.trained]) for one in both]
    assert [one.removesuffix("<|im_end|>") for one in answers] == ["yes0", "no0", "yes1", "no1"]


def test_the_revision_reaches_the_hub(tokenizer, monkeypatch):
    """data.revision and both splits are what the hub is asked for; a split without rows is named."""
    import datasets

    asked = []

    def load(*names: Any, **how: Any) -> Any:
        asked.append((*names, how["split"], how["revision"]))
        rows = [] if how["split"] == "none" else [{"text": how["split"]}]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "_reader_of", lambda *_: "json")
    hub.load_hub.cache_clear()
    prepared, _ = run(
        tokenizer, train="owner/name", eval="owner/name", train_split="a", eval_split="b", revision="v2"
    )
    assert asked == [("owner/name", None, "a", "v2"), ("owner/name", None, "b", "v2")]
    assert texts(tokenizer, prepared.eval) == ["b"]
    with pytest.raises(InputError, match="owner/name: holds no rows in split none"):
        run(tokenizer, train="owner/name", train_split="none")
    hub.load_hub.cache_clear()


@pytest.mark.parametrize("how", [{"eval_fraction": 0.25}, {"eval_rows": 20}])
def test_held_out_rows_are_chosen_by_what_they_say(tmp_path, tokenizer, how):
    """Held-out rows stay so in another order and beside more rows, with their duplicates, and are never trained."""
    rows = [f"row {number}" for number in range(120)] + [f"row {number}" for number in range(0, 120, 3)]

    def split(name: str, content: list[str]) -> tuple[set[str], list[str], list[str]]:
        prepared = run(tokenizer, train=write(tmp_path / name, content), **how)[0]
        held, trained = texts(tokenizer, prepared.eval), texts(tokenizer, prepared.train)
        assert not set(held) & set(trained)
        assert Counter(held + trained) == Counter(content)
        return set(held), held, trained

    held, every, _ = split("a.jsonl", rows)
    assert Counter(every) == Counter(row for row in rows if row in held)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert split("b.jsonl", shuffled)[0] == held
    grown, _, _ = split("c.jsonl", rows + [f"new {number}" for number in range(60)])
    if "eval_rows" in how:
        assert len(held) == len(grown) == 20
        assert {row for row in grown if row.startswith("row")} <= held
    else:
        assert {row for row in grown if row.startswith("row")} == held
        assert 15 <= len(held) <= 45


def test_rows_that_stand_in_both_splits_are_told(tmp_path, tokenizer):
    """A held-out row that is trained on as well gives a warning with its count and both places."""
    train = write(tmp_path / "train.jsonl", ["a", "b", "c"])
    said = run(tokenizer, train=train, eval=write(tmp_path / "eval.jsonl", ["x", "c", "b"]))[1]
    (warning,) = [line for line in said if line.startswith("warning: ")]
    assert "2 of 3 held-out rows are trained on as well" in warning
    assert f"{tmp_path / 'eval.jsonl'}:2 is {train}:3" in warning
    clean = run(tokenizer, train=train, eval=write(tmp_path / "other.jsonl", ["y"]))[1]
    assert not any("warning" in line for line in clean)


def test_bad_rows_are_skipped_up_to_the_cap(tmp_path, tokenizer, cache):
    """Bad rows anywhere, the first ones too, are left out, counted and named; one more than the cap stops."""
    good = [json.dumps({"text": f"row {number}"}) for number in range(97)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good[0], '{"txt\\ud800": 1}', "{", *good[1:], '{"text": 7}']))
    how = {"train": str(path), "on_bad_row": "skip"}
    prepared, said = run(tokenizer, max_bad_rows=0.03, **how)
    assert (prepared.counts["train"].bad, prepared.counts["train"].kept) == (3, 97)
    assert "3 bad ones skipped" in said[0]
    assert f"{path}:3: invalid JSON" in said[0] or f"{path}:2: column 'text'" in said[0]
    assert check_head(Data(max_bad_rows=0.03, **how), "train")
    with pytest.raises(InputError) as caught:
        run(tokenizer, max_bad_rows=0.029, **how)
    assert sorted(line.split(": ")[0] for line in caught.value.lines[:3]) == [
        f"{path}:{number}" for number in (100, 2, 3)
    ]
    assert "3 of 100 rows are bad, more than data.max_bad_rows 0.029" in caught.value.lines[-1]
    with pytest.raises(InputError, match=r"rows\.jsonl:100: text is int"):
        run(tokenizer, train=str(path), format="text")
    assert not list(cache.glob("*"))


def test_a_pair_that_is_refused_twice_is_one_bad_row(tmp_path, make_tokenizer):
    """A template that refuses both answers of a pair makes one bad row of it, not two."""
    content = [{"prompt": f"q{row}", "chosen": "yes", "rejected": "no"} for row in range(3)]
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    content.insert(1, {"prompt": system, "chosen": "yes", "rejected": "no"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    how = {"train": str(tmp_path / "pairs.jsonl"), "consumes": (Pair,), "on_bad_row": "skip"}
    prepared, said = run(make_tokenizer("gemma"), max_bad_rows=0.25, **how)
    counts = prepared.counts["train"]
    assert (counts.rows, counts.bad, counts.kept) == (3, 1, 3)
    assert "1 bad ones skipped (first: " in said[0]
    assert "pairs.jsonl:2: the chat template refuses this conversation" in said[0]


def test_a_file_that_changed_since_it_was_named(tmp_path, tokenizer, monkeypatch, cache):
    """A file written to between its fingerprint and its tokens is refused: the cache would not hold what it names."""
    path = write(tmp_path / "rows.jsonl", ["a", "b"])
    original = prepare.parts_of

    def then_changed(source: Any, **how: Any) -> Any:
        found = original(source, **how)
        write(tmp_path / "rows.jsonl", ["a", "c"])
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(prepare, "parts_of", then_changed)
    with pytest.raises(InputError, match="changed while it was read"):
        run(tokenizer, train=path)
    assert not list(cache.glob("*"))


def test_what_changed_since_is_known(tmp_path, tokenizer):
    """A run can ask at its end which files no longer hold what was read: rewritten ones, and ones that are gone."""
    names = [write(tmp_path / f"{name}.jsonl", [name]) for name in "abc"]
    prepared, _ = run(tokenizer, train=names)
    assert prepared.changed() == []
    write(tmp_path / "a.jsonl", ["aa"])
    (tmp_path / "c.jsonl").unlink()
    assert prepared.changed() == [names[0], names[2]]
