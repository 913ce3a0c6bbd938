"""Stage 1: rows -> conversations -> text -> tokens and trained mask -> memory-mapped data sets.

The main process tokenizes what has no cache of the same content yet; the others wait and open it. Bad rows stop the
stage with the first five of them named, or are skipped and counted, as the recipe says.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from lora_cli.data.cache import TokenCache, cache_root
from lora_cli.data.dataset import (
    CachedPart,
    Dataset,
    LabelledAnswers,
    Pairs,
    hold_out,
    mix,
    overlap,
    whole_pairs,
)
from lora_cli.data.faults import Faults
from lora_cli.data.formats import choose_format
from lora_cli.data.head import HEAD_ROWS, Origin, origins
from lora_cli.data.processes import run_all
from lora_cli.data.read import Source
from lora_cli.data.render import choose_template, settle_special_tokens
from lora_cli.data.templates import with_template
from lora_cli.data.tokenize import Reading, Task, Tokenization, file_state, parts_of
from lora_cli.errors import InputError
from lora_cli.publish import remove
from lora_cli.recipe.schema import Data
from lora_cli.stages._origin_rows import Job, line, nothing_left, report, too_many
from lora_cli.types import Conversation, Examples, Labelled, Pair, Prepared, Text

Split = Literal["train", "eval"]

_VIEWS: dict[tuple[type, ...], Callable[[Dataset], Examples]] = {
    (Pair,): Pairs,
    (Labelled,): LabelledAnswers,
    (Labelled, Pair): LabelledAnswers,
}
"""What an objective gets that learns from rows of these kinds; the others get each row as it is."""


class Processes(Protocol):
    """What this stage needs to know of the runtime."""

    def in_main(self, work: Callable[[], None]) -> None: ...


def run(
    data: Data,
    train_on: str,
    tokenizer: Any,
    rt: Processes,
    log: Callable[[str], None],
    *,
    need_train: bool = True,
    spelled: Sequence[str] = (),
    consumes: tuple[type, ...] = (Conversation, Text),
    adapter: Path | None = None,
) -> Prepared:
    """Prepare the recipe's splits; without `need_train` only the held-out one.

    `tokenizer` is a transformers fast tokenizer, left as it is; `log` receives one line per origin of rows. `spelled`
    are control tokens that a message may hold; other ones in it are ordinary text. `consumes` are the kinds of rows
    that the objective can use. `adapter` is the folder of an adapter that is read, not trained.

    Raises:
        InputError: if a split that is needed is not set, cannot be read, has bad rows, or none to train on.
        ResourceError: if the cache does not fit on the disk.
    """
    jobs = _find_jobs(data, need_train=need_train, consumes=consumes)
    tokenizer = with_template(tokenizer, data.template, adapter)
    # Text rows are never templated, so for them a template without terminator is no fault.
    templated = any(job.reading.format != "text" for job in jobs)
    template = choose_template(tokenizer, data.template) if templated else "plain"
    pad_id, stop_ids = settle_special_tokens(tokenizer, template)
    tokenization = Tokenization(data, train_on, tokenizer, template, spelled)
    for job in jobs:
        job.tasks = _tasks(job, tokenization)

    def build() -> None:
        for job in jobs:
            _ensure(job, tokenization, log)
        splits = _select(data, jobs)
        if "train" in splits and "eval" in splits:
            _warn_of_overlap(splits["train"], splits["eval"], log)

    rt.in_main(build)
    splits = _select(data, jobs)
    view = _VIEWS.get(consumes, lambda answers: answers)
    return Prepared(
        train=view(splits["train"]) if "train" in splits else None,
        eval=view(splits["eval"]) if "eval" in splits else None,
        tokenizer=tokenizer,
        pad_id=pad_id,
        stop_ids=stop_ids,
        formats={split: _formats(jobs, split) for split in splits},
        template=template,
        counts={job.origin.key.removeprefix("data."): job.tally.counts() for job in jobs},
        sources=tuple(map(report, jobs)),
        changed=lambda: _changed(jobs),
        contents={split: _contents(jobs, split) for split in splits},
    )


def _changed(jobs: list[Job]) -> list[str]:
    now = ((source, task.state) for job in jobs for source, task in job.tasks)
    return list(dict.fromkeys(source.name for source, state in now if file_state(source) != state))


def _contents(jobs: list[Job], split: str) -> str:
    digest = hashlib.sha256()
    for job in _jobs_of(jobs, split):
        for _, task in job.tasks:
            digest.update(f"{task.content}\n".encode())
    return digest.hexdigest()


def _find_jobs(data: Data, *, need_train: bool, consumes: tuple[type, ...]) -> list[Job]:
    jobs: list[Job] = []
    if not (need_train or data.holds_out()):
        raise InputError("data.eval: not set (name a file or a hub data set)")
    splits: list[Split] = ["train"] if need_train or data.eval is None else []
    splits += ["eval"] if data.eval is not None else []
    for split in splits:
        found = origins(data, split)
        if not found:
            raise InputError(f"data.{split}: not set (name a file or a hub data set)")
        jobs += [
            Job(origin, *_reading(origin, consumes, data.overlong, skips=data.on_bad_row == "skip"))
            for origin in found
        ]
    return jobs


def _reading(
    origin: Origin, consumes: tuple[type, ...], overlong: str, *, skips: bool
) -> tuple[Reading, bool]:
    """Return how an origin's rows are read, and whether that was found out from the first of them."""
    source = origin.sources[0]
    faults = Faults(source.name)
    head = list(islice(source.rows(faults), HEAD_ROWS))
    if not head:
        faults.raise_if_any()
    name, _ = choose_format(origin.format, origin.fields, head, origin.key, skips=skips)
    reading = Reading(name, origin.fields)
    if reading.makes is Pair and overlong == "split":
        raise InputError(
            f"{origin.key}: {source.name}: its rows are pairs, which data.overlong split would take apart (use drop or"
            " truncate_right)"
        )
    if reading.makes not in consumes:
        raise InputError(
            f"{origin.key}: {source.name}: its rows are {reading.kind} ({name}), which this objective cannot"
            f" learn from (give {_wanted(consumes)})"
        )
    return reading, origin.format == "auto" and origin.fields is None


def _wanted(consumes: tuple[type, ...]) -> str:
    if Labelled in consumes:
        return "answers with a label, or pairs of a chosen and a rejected one"
    if Pair in consumes:
        return "pairs of a chosen and a rejected answer, or set objective.name: sft"
    return "conversations, prompts with completions, or texts"


def _tasks(job: Job, tokenization: Tokenization) -> list[tuple[Source, Task]]:
    tasks = []
    most = job.origin.max_rows
    for source in job.origin.sources:
        state = file_state(source)
        for part, content in parts_of(source, whole=most is not None):
            name = tokenization.name(job.reading, content, most)
            folder = cache_root() / name[:32]
            tasks.append((source, Task(source, part, job.reading, most, folder, name, content, state)))
    return tasks


def _ensure(job: Job, tokenization: Tokenization, log: Callable[[str], None]) -> None:
    """Tokenize what has no sound cache, and log what the origin holds; a refused one leaves no cache behind.

    Raises:
        InputError: if there are bad rows, more of them than may be skipped, or none that can be used.
    """
    began = time.monotonic()
    skips = tokenization.data.on_bad_row == "skip"
    missing = [task for _, task in job.tasks if not _is_sound(task, skips=skips)]
    try:
        _build(job, missing, tokenization)
    except InputError:
        for task in missing:
            remove(task.folder)
        raise
    log(line(job, tokenization, f"{time.monotonic() - began:.1f} s" if missing else "cached"))


def _build(job: Job, missing: list[Task], tokenization: Tokenization) -> None:
    data = tokenization.data
    faults = Faults(job.origin.sources[0].name if len(job.origin.sources) == 1 else job.origin.key)
    # Closed at a fault, and not only when its message was printed: the other processes would go on until then.
    with closing(run_all(tokenization, missing)) as outcomes:
        for outcome in outcomes:
            if outcome.fault is not None:
                raise outcome.fault
            faults.join(outcome.tally.bad, outcome.bad_lines)
    if data.on_bad_row == "stop":
        faults.raise_if_any()
    job.open()
    if job.tally.bad > data.max_bad_rows * (job.tally.rows + job.tally.bad):
        raise InputError([*job.bad_lines, too_many(job, data)])
    if not job.tally.kept:
        raise InputError(nothing_left(job, data))


def _is_sound(task: Task, *, skips: bool) -> bool:
    try:
        cache = TokenCache(task.folder, check=True)
    except ValueError:
        return False
    return skips or not cache.meta["tally"]["bad"]


def _select(data: Data, jobs: list[Job]) -> dict[str, Dataset]:
    """Return the rows of each split."""
    parts: dict[str, list[CachedPart]] = {"train": [], "eval": []}
    rows: dict[str, list[np.ndarray]] = {"train": [], "eval": []}
    for job in jobs:
        job.open()
        split = "eval" if job.origin.key == "data.eval" else "train"
        before = sum(len(part.cache) for part in parts[split])
        # A pair is chosen as one row, its first; the second joins it at the end.
        rows[split].append(before + job.rows()[:: 2 if job.reading.makes is Pair else 1])
        parts[split] += job.parts
    splits: dict[str, Dataset] = {}
    if rows["eval"]:
        splits["eval"] = whole_pairs(parts["eval"], np.concatenate(rows["eval"]))
    if not rows["train"]:
        return splits
    everything = Dataset(parts["train"], np.concatenate(rows["train"]))
    chosen = rows["train"]
    if data.eval_fraction is not None or data.eval_rows is not None:
        held = np.zeros(everything.rows.max() + 1, dtype=np.bool_)
        held[everything.rows] = hold_out(everything.identities, data.eval_fraction, data.eval_rows)
        splits["eval"] = whole_pairs(
            parts["train"], everything.rows[held[everything.rows]][: data.max_eval_rows]
        )
        chosen = [one[~held[one]] for one in chosen]
        if not len(splits["eval"]) or not all(map(len, chosen)):
            raise InputError(
                f"data.{'eval_rows' if data.eval_rows else 'eval_fraction'}: leaves {len(splits['eval'])} rows to"
                f" evaluate and {sum(map(len, chosen))} to train (both are needed; change it, or set data.eval)"
            )
    weights = [job.origin.weight for job in jobs if job.origin.key != "data.eval"]
    given = [weight for weight in weights if weight is not None]
    splits["train"] = whole_pairs(parts["train"], mix(chosen, given) if given else np.concatenate(chosen))
    return splits


def _warn_of_overlap(train: Dataset, held_out: Dataset, log: Callable[[str], None]) -> None:
    found = overlap(train, held_out)
    if found:
        mine, theirs = found[0]
        log(
            f"warning: {len(found):,} of {len(held_out):,} held-out rows are trained on as well, so their scores say"
            f" little (first: {held_out.where(mine)} is {train.where(theirs)})"
        )


def _formats(jobs: list[Job], split: str) -> str:
    return ", ".join(sorted({job.reading.format for job in _jobs_of(jobs, split)}))


def _jobs_of(jobs: list[Job], split: str) -> list[Job]:
    """Return the origins of a split's rows; held-out rows without an origin are some of the training rows."""
    return [job for job in jobs if (job.origin.key == "data.eval") is (split == "eval")] or jobs
