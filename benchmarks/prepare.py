"""Tokens per second of the prepare stage beside `encode_batch` alone, on the same rows in the same run.

    python benchmarks/prepare.py                         # GSM8K, and a generated chat file of 20,000 rows
    python benchmarks/prepare.py --base ./my-model --template llama3 --rounds 5

`encode_batch` gets the finished texts in the chunks that the stage uses, and nothing else is timed with it. The stage
reads the file, checks it against its format, renders each row and each prompt in it, encodes, finds the trained tokens,
and writes the cache, which is empty at the start of each round. The two take turns, so that a slow minute does not fall
on one of them; a figure is the median, with the smallest and largest behind. The ratio in processor time does not
depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_cli.data.faults import Faults
from lora_cli.data.fields import fields_reader
from lora_cli.data.formats import FORMATS
from lora_cli.data.read import find_sources
from lora_cli.data.render import Rendered, Renderer, choose_template
from lora_cli.data.templates import with_template
from lora_cli.data.tokenize import CHUNK_ROWS
from lora_cli.data.tokens import Encoder
from lora_cli.models.load import base_folder, load_tokenizer
from lora_cli.recipe.schema import Data, Fields
from lora_cli.stages import prepare

ROOT = Path(__file__).resolve().parent.parent


class OneProcess:
    """What the stage needs to know of the processes: there is one."""

    def in_main(self, work: Callable[[], None]) -> None:
        """Do it."""
        work()


def chat_file(path: Path, texts: Sequence[str], rows: int) -> Path:
    """Write conversations of one to four questions; what is said are pieces of `texts`."""
    draw = random.Random(0)
    words = " ".join(texts).split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            said = []
            if draw.random() < 0.5:
                said.append({"role": "system", "content": "You are a helpful assistant."})
            for _ in range(draw.randint(1, 4)):
                for role, most in (("user", 60), ("assistant", 160)):
                    start = draw.randrange(len(words) - most)
                    text = " ".join(words[start : start + draw.randint(5, most)])
                    said.append({"role": role, "content": text})
            file.write(json.dumps({"messages": said}, ensure_ascii=False) + "\n")
    return path


def rendered_rows(data: Data, tokenizer: Any) -> tuple[list[Rendered], dict[str, float]]:
    """Return every row rendered, and the seconds that reading and rendering took."""
    (source,) = find_sources(data.train or "", "data.train", "train", None)
    renderer = Renderer(tokenizer, choose_template(tokenizer, data.template), "assistant")
    read = fields_reader(data.fields) if data.fields else FORMATS["chat"].read
    faults = Faults(source.name)
    start = time.perf_counter()
    rows: Any = [read(row) for row in source.rows(faults)]
    middle = time.perf_counter()
    found = [
        one
        for place in range(0, len(rows), CHUNK_ROWS)
        for one in renderer.render(rows[place : place + CHUNK_ROWS], faults)
    ]
    end = time.perf_counter()
    faults.raise_if_any()
    return [one for one in found if one is not None], {"read": middle - start, "render": end - middle}


def processor_time() -> float:
    """Return the seconds that this process and those it waited for have computed."""
    return sum(os.times()[:4])


def measure(name: str, data: Data, tokenizer: Any, rounds: int) -> float:
    """Print the figures of one file and return the ratio of the medians."""
    used = with_template(tokenizer, data.template)
    rows, seconds = rendered_rows(data, used)
    renderer = Renderer(used, choose_template(used, data.template), "assistant")
    encoder = Encoder(used, renderer.controls)
    chunks = [rows[place : place + CHUNK_ROWS] for place in range(0, len(rows), CHUNK_ROWS)]
    start = time.perf_counter()
    tokens = sum(len(example.input_ids) for chunk in chunks for example in encoder.encode(chunk))
    seconds["encode and mask"] = time.perf_counter() - start
    backend = encoder.backend
    alone, whole, busy = [], [], []
    for _ in range(rounds):
        start, worked = time.perf_counter(), processor_time()
        for chunk in chunks:
            backend.encode_batch([row.text for row in chunk], add_special_tokens=False)
        alone.append(tokens / (time.perf_counter() - start))
        encoding_worked = processor_time() - worked
        with tempfile.TemporaryDirectory() as cache:
            os.environ["LORA_CLI_CACHE"] = cache
            start, worked = time.perf_counter(), processor_time()
            prepared = prepare.run(data, "assistant", tokenizer, OneProcess(), lambda line: None)
            whole.append(tokens / (time.perf_counter() - start))
            busy.append(encoding_worked / (processor_time() - worked))
        assert prepared.counts["train"].tokens == tokens
    encoding = tokens / statistics.median(alone)
    print(f"{name}: {len(rows):,} rows, {tokens:,} tokens")
    for what, figures in (("encode_batch alone", alone), ("prepare", whole)):
        print(
            f"  {what:<19}{statistics.median(figures):>12,.0f} tokens/s ({min(figures):,.0f} to {max(figures):,.0f})"
        )
    for what, took in {**seconds, "encode_batch": encoding}.items():
        print(f"  {what:<19}{took:>10.2f} s, {took / encoding:.2f} of encode_batch")
    ratio = statistics.median(whole) / statistics.median(alone)
    print(f"  ratio {ratio:.2f}, in processor time {statistics.median(busy):.2f}", flush=True)
    return ratio


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both files."""
    parser = argparse.ArgumentParser(description="Compare the prepare stage with encode_batch alone.")
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the generated chat file")
    parser.add_argument("--gsm8k", type=Path, default=ROOT.parent / "shared" / "data", metavar="FOLDER")
    options = parser.parse_args(arguments)
    train = options.gsm8k / "gsm8k.train.jsonl"
    if not train.is_file():
        sys.exit(f"prepare.py: there is no {train} (--gsm8k FOLDER)")
    tokenizer = load_tokenizer(base_folder(options.base))
    settings: dict[str, Any] = {"max_length": 1_000_000, "template": options.template}
    fields = Fields(prompt="{question}", completion="{answer}")
    measure("GSM8K", Data(train=str(train), fields=fields, **settings), tokenizer, options.rounds)
    answers = [json.loads(line)["answer"] for line in train.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        chats = chat_file(Path(folder) / "chats.jsonl", answers, options.rows)
        measure("chats", Data(train=str(chats), **settings), tokenizer, options.rounds)


if __name__ == "__main__":
    main()
