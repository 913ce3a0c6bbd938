"""The prepare stage from files to mapped tokens: counts, policies, caches, faults, and real data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_cli.data import tokenize
from lora_cli.data.head import check_head
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Data, Fields
from lora_cli.stages import prepare
from lora_cli.types import Prepared

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
GSM8K = Fields(prompt="{question}", completion="{answer}")
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Process:
    """A process of a run; `at_barrier` is called when it waits."""

    def __init__(self, *, is_main: bool = True, at_barrier: Callable[[], None] = lambda: None) -> None:
        self.is_main = is_main
        self._at_barrier = at_barrier

    def in_main(self, work: Callable[[], None]) -> None:
        if self.is_main:
            work()
        self._at_barrier()


@pytest.fixture(scope="module")
def backend() -> str:
    """A byte-level BPE without merges: every byte is a token, so lengths can be counted by hand."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=259, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    return tokenizer.to_str()


@pytest.fixture
def tokenizer(backend: str) -> PreTrainedTokenizerFast:
    """A ChatML tokenizer whose end token is not the terminator."""
    loaded = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), eos_token="<|endoftext|>")
    loaded.chat_template = CHATML
    return loaded


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test has its own cache folder, in which no hidden folder may be left."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "tokens"
    yield folder
    assert not list(folder.glob(".*"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(*answers: str) -> list[dict[str, Any]]:
    return [{"prompt": f"q{index}", "completion": answer} for index, answer in enumerate(answers)]


def run(data: Data, tokenizer: Any, train_on: str = "assistant", **more: Any) -> tuple[Prepared, list[str]]:
    lines: list[str] = []
    rt = more.pop("rt", None) or Process()
    return prepare.run(data, train_on, tokenizer, rt, lines.append, **more), lines


# Tokens of `<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n`; the answer, <|im_end|> and \n follow.
PROMPT = 21


def test_tokens_masks_and_counts(tmp_path, tokenizer):
    """Rows come in order with the right tokens and mask, and every count adds up."""
    answers = ["four", "fifteen"]
    prepared, lines = run(Data(train=write(tmp_path / "a.jsonl", pairs(*answers))), tokenizer)
    assert prepared.train is not None
    assert prepared.eval is None
    for index, answer in enumerate(answers):
        example = prepared.train[index]
        whole = f"<|im_start|>user\nq{index}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        assert tokenizer.decode(example.input_ids) == whole
        assert tokenizer.decode(example.input_ids[example.trained]) == f"{answer}<|im_end|>"
    assert prepared.train.lengths.tolist() == [PROMPT + len(answer) + 2 for answer in answers]
    counts = prepared.counts["train"]
    assert (counts.rows, counts.kept, counts.dropped, counts.truncated) == (2, 2, 0, 0)
    assert (counts.tokens, counts.trained_tokens) == (2 * PROMPT + 15, 13)
    assert (prepared.formats["train"], prepared.template) == ("prompt_completion", "model")
    assert prepared.stop_ids == tuple(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    said = "data.train: a.jsonl: prompt_completion (detected), template model: 2 of 2 rows kept, 57 tokens"
    assert lines[0].startswith(f"{said}, 13 trained; ")


@pytest.mark.parametrize(
    ("overlong", "lengths", "counts", "said"),
    [
        ("drop", [26], (3, 1, 2, 0, 36), "2 dropped (longer than 29 tokens)"),
        ("truncate_right", [26, 29, 29], (3, 3, 0, 2, 20), "2 truncated to 29 tokens"),
    ],
)
def test_overlong_rows(tmp_path, tokenizer, overlong, lengths, counts, said):
    """Longer rows are left out or cut at the right, and the trained tokens that are lost are counted."""
    path = write(tmp_path / "a.jsonl", pairs("abc", "a" * 10, "a" * 24))
    prepared, lines = run(Data(train=path, max_length=29, overlong=overlong), tokenizer)
    assert prepared.train is not None
    assert prepared.train.lengths.tolist() == lengths
    found = prepared.counts["train"]
    assert (found.rows, found.kept, found.dropped, found.truncated, found.lost_trained_tokens) == counts
    assert said in lines[0]
    assert f"{counts[-1]} trained tokens lost" in lines[0]


def test_a_cut_row_without_target_is_dropped(tmp_path, tokenizer):
    """A row whose prompt alone fills max_length has nothing to train; it is dropped and said so."""
    rows = [{"prompt": "q" * 50, "completion": "a"}, {"prompt": "q", "completion": "a"}]
    prepared, lines = run(
        Data(train=write(tmp_path / "a.jsonl", rows), max_length=30, overlong="truncate_right"), tokenizer
    )
    counts = prepared.counts["train"]
    assert (counts.kept, counts.dropped, counts.truncated, counts.lost_trained_tokens) == (1, 1, 0, 2)
    assert "1 dropped (nothing to train)" in lines[0]


def test_overlong_error_names_the_rows(tmp_path, tokenizer, cache):
    """With overlong error, each longer row is named with its length, and no cache is left."""
    path = write(tmp_path / "a.jsonl", pairs("abc", "a" * 10, "a" * 24))
    with pytest.raises(InputError) as caught:
        run(Data(train=path, max_length=29, overlong="error"), tokenizer)
    assert [line.split(",")[0] for line in caught.value.lines] == [
        f"{path}:2: 33 tokens",
        f"{path}:3: 47 tokens",
    ]
    assert not list(cache.glob("*"))


def test_nothing_left(tmp_path, tokenizer, cache):
    """A split of which no row fits is refused with the longest length and what to do."""
    data = Data(train=write(tmp_path / "a.jsonl", pairs("abc", "a" * 10)), max_length=8)
    with pytest.raises(InputError, match=r"none of 2 rows .* the longest has 33 tokens .*raise it.*truncate"):
        run(data, tokenizer)
    assert not list(cache.glob("*"))


def test_bad_rows_stop_with_the_first_five(tmp_path, tokenizer, cache):
    """Faults of the file and of the format are told together in the order of the rows, and leave no cache."""
    rows = [
        json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    ] * 60
    rows[51:58] = ["{", '{"messages": []}', "[]", '{"messages": 3}', '{"m": 1}', '{"messages": null}', "null"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(InputError) as caught:
        run(Data(train=str(path)), tokenizer)
    named = [int(line.removeprefix(f"{path}:").split(":")[0]) for line in caught.value.lines[:5]]
    assert named == [52, 53, 54, 55, 56]
    assert caught.value.lines[5] == f"{path}: 7 bad rows in all, the first 5 are above"
    assert not list(cache.glob("*"))


def test_types_that_differ_far_down_the_file(tmp_path, tokenizer):
    """A field that is text for 2,000 rows and then a number is named by its line."""
    path = write(tmp_path / "a.jsonl", [*pairs(*["a"] * 2000), {"prompt": "q", "completion": 7}])
    with pytest.raises(InputError, match=r"a\.jsonl:2001: completion is int \(text is needed\)"):
        run(Data(train=path), tokenizer)


def test_the_second_run_uses_the_cache(tmp_path, tokenizer, monkeypatch):
    """The same content is tokenized once, wherever the file lies; counts and tokens are the same."""
    first, _ = run(Data(train=write(tmp_path / "a.jsonl", pairs("x", "yy"))), tokenizer)
    monkeypatch.setattr(tokenize.Tokenization, "run", lambda *_: pytest.fail("tokenized again"))
    second, lines = run(Data(train=write(tmp_path / "b.jsonl", pairs("x", "yy"))), tokenizer)
    assert lines[0].endswith("; cached")
    assert first.train is not None
    assert second.train is not None
    assert second.counts == first.counts
    assert second.train.fingerprint == first.train.fingerprint
    np.testing.assert_array_equal(second.train[1].input_ids, first.train[1].input_ids)


def test_whatever_changes_the_tokens_changes_the_fingerprint(tmp_path, tokenizer, backend):
    """Content, length, policy, rows, template, trained part and tokenizer: each changes the fingerprint."""
    path = write(tmp_path / "a.jsonl", pairs("x", "yy"))

    def of(data: Data, train_on: str = "assistant", tok: Any = tokenizer) -> str:
        train = run(data, tok, train_on)[0].train
        assert train is not None
        return train.fingerprint

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), eos_token="<|endoftext|>")
    other.chat_template = CHATML.replace("\\n", "\\n\\n")
    another = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), eos_token="<|im_end|>")
    another.chat_template = CHATML
    found = [
        of(Data(train=path)),
        of(Data(train=path), "all"),
        of(Data(train=path, max_length=100)),
        of(Data(train=path, overlong="truncate_right")),
        of(Data(train=path, max_train_rows=1)),
        of(Data(train=path, template="plain")),
        of(Data(train=path, fields=Fields(prompt="{prompt}", completion="{completion}"))),
        of(Data(train=path), tok=other),
        of(Data(train=path), tok=another),
        of(Data(train=write(tmp_path / "b.jsonl", pairs("x", "yz")))),
    ]
    assert len(set(found)) == len(found)


def test_a_damaged_cache_is_rebuilt(tmp_path, tokenizer, cache):
    """A flipped byte in the tokens is noticed, and the split is tokenized again with the same result."""
    data = Data(train=write(tmp_path / "a.jsonl", pairs("x", "yy")))
    first, _ = run(data, tokenizer)
    assert first.train is not None
    expected = first.train[0].input_ids.tolist()
    (folder,) = cache.iterdir()
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[0] ^= 1
    (folder / "tokens.bin").unlink()
    (folder / "tokens.bin").write_bytes(content)
    second, lines = run(data, tokenizer)
    assert second.train is not None
    assert second.train[0].input_ids.tolist() == expected
    assert not lines[0].endswith("cached")


def test_other_processes_read_what_the_main_one_wrote(tmp_path, tokenizer):
    """A process that is not the main one writes nothing, waits, and opens the same caches silently."""
    data = Data(
        train=write(tmp_path / "a.jsonl", pairs("x", "yy")), eval=write(tmp_path / "b.jsonl", pairs("z"))
    )
    waited = []

    def main_works() -> None:
        waited.append(run(data, tokenizer)[0])

    prepared, lines = run(data, tokenizer, rt=Process(is_main=False, at_barrier=main_works))
    assert lines == []
    assert len(waited) == 1
    assert prepared.counts == waited[0].counts
    assert prepared.train is not None
    assert prepared.eval is not None
    assert (len(prepared.train), len(prepared.eval)) == (2, 1)


def test_a_file_that_changes_while_it_is_read(tmp_path, tokenizer, cache, monkeypatch):
    """Rows appended while the file is read stop the stage: the cache would not be that of either file."""
    path = write(tmp_path / "a.jsonl", pairs("x", "yy"))
    original = tokenize.fit

    def fit(*arguments: Any) -> Any:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(pairs("z")[0]) + "\n")
        return original(*arguments)

    monkeypatch.setattr(tokenize, "fit", fit)
    with pytest.raises(InputError, match="changed while it was read"):
        run(Data(train=path), tokenizer)
    assert not list(cache.glob("*"))


def test_only_the_first_rows(tmp_path, tokenizer):
    """max_train_rows and max_eval_rows take rows from the start, and read no further."""
    path = write(tmp_path / "a.jsonl", pairs(*"abcdef"))
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * 100 + "{")
    prepared, _ = run(Data(train=path, eval=path, max_train_rows=4, max_eval_rows=2), tokenizer)
    assert prepared.train is not None
    assert prepared.eval is not None
    assert (len(prepared.train), len(prepared.eval)) == (4, 2)
    assert tokenizer.decode(prepared.train[3].input_ids[prepared.train[3].trained]) == "d<|im_end|>"


def test_evaluation_alone(tmp_path, tokenizer):
    """Without need_train the training file is not even looked at; a split that is needed must be set."""
    data = Data(train=str(tmp_path / "missing.jsonl"), eval=write(tmp_path / "b.jsonl", pairs("z")))
    prepared, lines = run(data, tokenizer, need_train=False)
    assert prepared.train is None
    assert prepared.eval is not None
    assert [line.split(":")[0] for line in lines] == ["data.eval"]
    with pytest.raises(InputError, match=r"data\.eval: not set"):
        run(Data(train=data.eval), tokenizer, need_train=False)
    with pytest.raises(InputError, match=r"data\.train: not set"):
        run(Data(eval=data.eval), tokenizer)


def test_text_needs_no_terminator_in_the_template(tmp_path, tokenizer):
    """Text rows are not templated, so a chat template without terminator does not matter to them."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    prepared, lines = run(Data(train=str(tmp_path / "a.txt")), tokenizer)
    assert prepared.train is not None
    assert tokenizer.decode(prepared.train[1].input_ids) == "two<|endoftext|>"
    assert prepared.template == "plain"
    assert prepared.stop_ids == (tokenizer.eos_token_id,)
    assert "text (detected), untemplated" in lines[0]
    with pytest.raises(InputError, match="no control token after an assistant turn"):
        run(Data(train=write(tmp_path / "a.jsonl", pairs("x"))), tokenizer)


def test_end_token_as_padding_is_still_trained(tmp_path, tokenizer):
    """Where the end token pads, the end token that closes a row is a target all the same."""
    tokenizer.pad_token = tokenizer.eos_token
    prepared, _ = run(Data(train=write(tmp_path / "a.jsonl", pairs("x")), template="plain"), tokenizer)
    assert prepared.train is not None
    example = prepared.train[0]
    assert prepared.pad_id == tokenizer.eos_token_id == example.input_ids[-1]
    assert example.trained[-1]


def test_the_tokenizer_is_left_as_it_was(tmp_path, tokenizer):
    """Preparing changes nothing that an export would write."""
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template
    run(Data(train=write(tmp_path / "a.jsonl", pairs("x<|im_end|>y"))), tokenizer)
    assert (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    ) == before


def real(name: str) -> str:
    if not SHARED.is_dir():
        pytest.skip("real data folder ../shared/data is absent")
    return str(SHARED / name)


def test_gsm8k(tokenizer):
    """Real questions: each of the rows is kept, and its trained text is the answer and the terminator."""
    path = real("gsm8k.test.jsonl")
    data = Data(eval=path, fields=GSM8K, max_length=8192)
    assert check_head(data, "eval") == ["data.eval: gsm8k.test.jsonl: fields, first 50 rows ok"]
    prepared, _ = run(data, tokenizer, need_train=False)
    assert prepared.eval is not None
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert len(prepared.eval) == len(rows) == 1319
    for index in range(0, len(rows), 7):
        example = prepared.eval[index]
        assert tokenizer.decode(example.input_ids[example.trained]) == rows[index]["answer"] + "<|im_end|>"


def test_alpaca(tokenizer):
    """Real instructions are detected as alpaca; the counts of kept and dropped rows add up."""
    path = real("alpaca_en_demo.json")
    prepared, lines = run(Data(train=path), tokenizer)
    counts = prepared.counts["train"]
    assert set(prepared.formats.values()) == {"alpaca"}
    assert counts.rows == counts.kept + counts.dropped == 999
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    assert prepared.train is not None
    example = prepared.train[0]
    clean = tokenizer.decode(example.input_ids[example.trained], clean_up_tokenization_spaces=False)
    first = next(row for row in rows if len(row["output"].encode()) + len(row["instruction"].encode()) < 900)
    assert clean == first["output"] + "<|im_end|>"
    assert "longer than 1024 tokens" in lines[0]


def test_wiki(tokenizer):
    """Real documents, one per line, are cut to max_length, trained from their second token."""
    prepared, _ = run(Data(train=real("wiki_demo.txt"), max_length=100, overlong="truncate_right"), tokenizer)
    counts = prepared.counts["train"]
    assert (counts.rows, counts.kept, counts.truncated, counts.trained_tokens) == (30, 30, 30, 30 * 99)


def test_preference_rows_are_not_taken_for_conversations(tokenizer):
    """Rows of another objective are refused, with the columns they have."""
    with pytest.raises(InputError, match=r"preference pairs \(sharegpt_preference\), which this"):
        run(Data(train=real("dpo_en_demo.json")), tokenizer)
