"""What is worth knowing about a description of the data: each finding has a number, a place and a remedy.

A `warning` is something that makes a run worse or impossible, a `note` something that may well be meant. What some
rows of nearly every data set have (duplicates, over-long rows, unknown characters) becomes a warning from a share on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_cli.recipe.schema import Recipe
from lora_cli.types import Conversation, Labelled, Pair, Text

MANY_ROWS = 0.01
"""Share of a split's rows from which losing or repeating them is a warning."""
MANY_UNKNOWN, MANY_BYTES = 0.001, 0.05
"""Shares of tokens from which unknown characters, and those written byte by byte, are a warning."""
MUCH_PADDING = 0.25
_KINDS = {
    "preference pairs": Pair,
    "labelled answers": Labelled,
    "texts": Text,
    "conversations": Conversation,
}

Finding = dict[str, Any]


def findings(
    said: Mapping[str, Any],
    recipe: Recipe,
    config: Mapping[str, Any],
    consumes: tuple[type, ...],
    refusals: Sequence[str],
) -> list[Finding]:
    """Return the findings, warnings first; `config` is the text model's, `consumes` what the objective learns from.

    `refusals` are what training would say before it refuses.
    """
    found = [
        *(
            _finding("refused", True, 1, f"training would refuse: {line}", None, "see there")
            for line in refusals
        ),
        *_of_objective(said, consumes),
        *(one for source in said["sources"] for one in _of_source(source, recipe, _positions(config))),
        *(one for name, split in said["splits"].items() for one in _of_split(name, split, said, config)),
        *_of_overlap(said),
        *_of_epoch(said, recipe),
    ]
    return sorted(found, key=lambda one: one["level"] != "warning")


def _finding(name: str, many: bool, number: int, what: str, where: str | None, remedy: str) -> Finding:
    return {
        "level": "warning" if many else "note",
        "name": name,
        "number": number,
        "what": what,
        "where": where,
        "remedy": remedy,
    }


def unlearnt(said: Mapping[str, Any], consumes: tuple[type, ...]) -> list[Mapping[str, Any]]:
    """Return the sources whose rows the objective cannot learn from."""
    return [source for source in said["sources"] if _KINDS[source["kind"]] not in consumes]


def _of_objective(said: Mapping[str, Any], consumes: tuple[type, ...]) -> Iterator[Finding]:
    for source in unlearnt(said, consumes):
        what = (
            f"{source['key']}: its rows are {source['kind']}, which the objective {said['objective']} cannot learn"
            " from: they are shown, and training would refuse them"
        )
        remedy = "choose another objective, or give conversations, prompts with completions, or texts"
        yield _finding("not_consumed", True, source["counts"]["kept"], what, None, remedy)


def _positions(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a model was made for, where its config says so."""
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def _of_source(source: Mapping[str, Any], recipe: Recipe, positions: int | None) -> Iterator[Finding]:
    counts, key, firsts = source["counts"], source["key"], source["firsts"]
    rows = counts["rows"] + counts["bad"]
    lost = f"{counts['lost_trained_tokens']:,} trained tokens lost"
    limit = recipe.data.max_length
    raised = f"data.max_length={source['longest']} keeps all"
    if positions is not None and source["longest"] > positions:
        raised = f"the longest has {source['longest']:,} tokens, the model was made for {positions:,}"
    if counts["bad"]:
        what = f"{key}: {_of(counts['bad'], rows, 'rows')} are bad and were skipped"
        where = source["bad_lines"][0] if source["bad_lines"] else None
        yield _finding("bad_rows", True, counts["bad"], what, where, "mend them")
    if source["too_long"]:
        what = f"{key}: {_of(source['too_long'], rows, 'rows')} are longer than {limit} tokens and were dropped, {lost}"
        remedy = f"{raised}; data.overlong can cut or split instead"
        many = source["too_long"] > MANY_ROWS * rows
        yield _finding("too_long", many, source["too_long"], what, firsts["too_long"], remedy)
    if counts["truncated"]:
        how = "split" if recipe.data.overlong == "split" else "cut"
        what = f"{key}: {_of(counts['truncated'], rows, 'rows')} were {how} to {limit} tokens, {lost}"
        many = how == "cut" and counts["truncated"] > MANY_ROWS * rows
        yield _finding("truncated", many, counts["truncated"], what, firsts["truncated"], raised)
    if source["untrained"]:
        what = f"{key}: {_of(source['untrained'], rows, 'rows')} have nothing to train and were dropped"
        remedy = "look at its answer, at `train: false`, and at objective.train_on"
        yield _finding("untrained", True, source["untrained"], what, firsts["untrained"], remedy)
    if source["epoch_repeats"] >= 2:
        what = f"{key}: each of its rows stands {source['epoch_repeats']:g} times in an epoch"
        yield _finding("repeated", False, source["epoch_rows"], what, None, "lower its weight, or add rows")


def _of_split(
    name: str, split: Mapping[str, Any], said: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[Finding]:
    rows, tokens, unknown = split["rows"], split["tokens"], split["unknown"]
    twins = split["duplicates"]
    if twins["rows"]:
        what = f"{name}: {_of(twins['rows'], twins['of'], 'rows')} say what an earlier row says"
        where = f"{twins['first']} is {twins['repeats']}"
        many = twins["rows"] > MANY_ROWS * twins["of"]
        yield _finding("duplicates", many, twins["rows"], what, where, "remove them, unless they are meant")
    ends = split["without_terminator"]
    if ends["rows"]:
        what = f"{name}: {_of(ends['rows'], rows, 'rows')} train no terminator, so they do not teach where to stop"
        whole = all(source["format"] == "text" for source in said["sources"])
        remedy = "raise data.max_length: their ends are cut off" if not whole else "right for pieces of texts"
        yield _finding("no_terminator", not whole, ends["rows"], what, ends["first"], remedy)
    if split["begins_twice"]["rows"]:
        twice = split["begins_twice"]
        what = (
            f"{name}: {_of(twice['rows'], rows, 'rows')} begin with {said['tokens']['begin']['text']} twice"
        )
        remedy = "remove it from the rows, or from the template"
        yield _finding("begins_twice", True, twice["rows"], what, twice["first"], remedy)
    for kind, many, how in (
        ("tokens", MANY_UNKNOWN, "the unknown token"),
        ("byte_tokens", MANY_BYTES, "single bytes"),
    ):
        if unknown[kind]:
            named = " ".join(unknown["characters"])
            what = f"{name}: {_of(unknown[kind], tokens, 'tokens')} are {how} for characters without one" + (
                f": {named}" if named else ""
            )
            remedy = "normalise the text, or choose a base that knows its script"
            is_many = unknown[kind] > many * tokens
            yield _finding(f"unknown_{kind}", is_many, unknown[kind], what, unknown["first"], remedy)
    yield from _of_limits(name, split, config)


def _of_limits(name: str, split: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Finding]:
    vocabulary = config.get("vocab_size")
    if isinstance(vocabulary, int) and split["max_token"] >= vocabulary:
        what = f"{name}: holds token {split['max_token']}, but the model's vocabulary has {vocabulary}"
        remedy = "is this the model's own tokenizer? training will refuse"
        yield _finding("beyond_vocabulary", True, split["max_token"], what, None, remedy)
    positions, longest = _positions(config), int(split["lengths"]["max"])
    if positions is not None and longest > positions:
        what = (
            f"{name}: the longest row has {longest:,} tokens, the model was made for {positions:,} positions"
        )
        remedy = f"data.max_length={positions}"
        yield _finding("beyond_positions", True, longest, what, split["longest"][0]["where"], remedy)


def _of_overlap(said: Mapping[str, Any]) -> Iterator[Finding]:
    found = said["overlap"]
    if found is None:
        remedy = "data.eval, or data.eval_fraction=0.05"
        what = "there are no held-out rows, so nothing tells learning from memorising"
        yield _finding("no_eval", False, 0, what, None, remedy)
    elif found["rows"]:
        what = (
            f"eval: {_of(found['rows'], found['of'], 'rows')} are trained on as well: their scores say little"
        )
        where = f"{found['first']} is {found['repeats']}"
        yield _finding("overlap", True, found["rows"], what, where, "remove them from one side")


def _of_epoch(said: Mapping[str, Any], recipe: Recipe) -> Iterator[Finding]:
    rows, epoch, tokens = said["splits"]["train"]["rows"], said["epoch"], said["tokens"]
    if rows < recipe.train.batch_size:
        what = f"train: {rows} rows do not fill one step of train.batch_size {recipe.train.batch_size}"
        yield _finding("few_rows", False, rows, what, None, "add rows, or lower it")
    if epoch and not epoch["packed"] and epoch["padded"]["padding"] > MUCH_PADDING:
        share = epoch["padded"]["padding"]
        what = f"train: {share:.0%} of the positions in a forward pass are padding"
        yield _finding("padding", False, epoch["padded"]["passes"], what, None, "data.packing=true has none")
    if tokens["pad_ends_answers"]:
        what = (
            f"{tokens['pad']['text']} pads and ends answers; this does no harm here, since labels do not depend on"
            " the pad token"
        )
        yield _finding("pad_is_terminator", False, tokens["pad"]["id"], what, None, "nothing to do")


def _of(number: int, total: int, what: str) -> str:
    share = number / total if total else 0.0
    return (
        f"{number:,} of {total:,} {what} ({share:.2%})" if share < 0.1 else f"{number:,} of {total:,} {what}"
    )
