"""Tables of what was measured, as Markdown: every figure is a median over the rounds, with the range behind."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from side_by_side import equal, roofline, starting
from side_by_side.cases import OURS, PEERS, Case
from side_by_side.records import Document, Record


@dataclass
class Measured:
    """One case: records of each side by round, and why a side has none."""

    name: str
    case: Case
    work: Sequence[Sequence[Document]]
    config: Mapping[str, Any]
    dtype: str
    warmup: dict[str, int] = field(default_factory=dict)
    sides: dict[str, list[Record]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def step(self, side: str) -> list[float]:
        """Return the median seconds of a timed step in each round."""
        skip = self.warmup[side]
        return [statistics.median(one.seconds for one in record.steps[skip:]) for record in self.sides[side]]

    def token(self, side: str) -> list[float]:
        """Return the median seconds a real token of the timed steps in each round."""
        skip = self.warmup[side]
        steps = (record.steps[skip:] for record in self.sides[side])
        return [statistics.median(one.seconds / one.real_tokens for one in timed) for timed in steps]

    def rate(self, side: str, tokens: str) -> list[float]:
        """Return the tokens a second of the timed steps in each round; `tokens` names which."""
        found = []
        for record in self.sides[side]:
            timed = record.steps[self.warmup[side] :]
            found.append(sum(getattr(one, tokens) for one in timed) / sum(one.seconds for one in timed))
        return found

    def beside_ours(self, side: str) -> list[float]:
        """Return the seconds a token in ours, round by round; of the same steps, or of as many others."""
        return ratios(self.token(side), self.token("ours"))

    def tuned(self) -> list[str]:
        """Return the tuned peers that were measured."""
        return [side for side in self.sides if side != "ours" and PEERS[side].tuned]

    def useful(self) -> list[float]:
        """Return the operations a second of useful work in our timed steps, by round."""
        found = []
        for record in self.sides["ours"]:
            operations = seconds = 0.0
            for number in range(self.warmup["ours"], len(record.steps)):
                lengths = [len(ids) for ids, _ in self.work[number]]
                step = record.steps[number]
                full = self.case.method == "full"
                operations += roofline.useful_operations(
                    dict(self.config), lengths, step.labelled_tokens, full=full
                )
                seconds += step.seconds
            found.append(operations / seconds)
        return found


def ratios(these: Iterable[float], those: Iterable[float]) -> list[float]:
    """Return the quotients, round by round."""
    return [one / other for one, other in zip(these, those, strict=False)]


def spread(values: Iterable[float], form: str) -> str:
    """Return the median, and the range where there is one."""
    values = list(values)
    middle, low, high = (
        format(value, form) for value in (statistics.median(values), min(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def case_table(one: Measured) -> str:
    """Return a line for each side of a case."""
    names = [
        "side",
        "s a step",
        "tokens/s",
        "labelled/s",
        "peak GB",
        "first step s",
        "beside ours",
        "loss differs by",
    ]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for side, records in one.sides.items():
        differs = max(
            equal.largest_difference(*pair) for pair in zip(records, one.sides["ours"], strict=False)
        )
        cells = [
            side,
            spread(one.step(side), ".3f"),
            spread(one.rate(side, "real_tokens"), ",.0f"),
            spread(one.rate(side, "labelled_tokens"), ",.0f"),
            spread((record.peak_bytes / 1e9 for record in records), ".2f"),
            spread((record.first_step_seconds for record in records), ".1f"),
            "" if side == "ours" else spread(one.beside_ours(side), ".2f"),
            "" if side == "ours" else f"{differs:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = one.sides["ours"][0].steps[0]
    text = f"### {one.case.title}\n\n{one.dtype}; step 1: {len(one.work[0])} documents, {first.real_tokens:,} tokens,"
    text += f" {first.labelled_tokens:,} labelled, sha256 {first.sha256[:16]}."
    text += f" {one.case.note[:1].upper()}{one.case.note[1:]}." if one.case.note else ""
    lines = [text, "", *lines]
    lines += [""] * bool(one.skipped) + [f"{side}: not measured, {why}" for side, why in one.skipped.items()]
    return "\n".join(lines)


def goal_rows(cases: Mapping[str, Measured], rates: Sequence[Record]) -> list[str]:
    """Return a line for each goal that the measured cases have, with what was measured beside it."""
    rows = []
    for one in cases.values():
        goals = one.case
        if "trl" in one.sides and goals.default_goal is not None:
            rows.append(
                _at_least(one, "TRL's default time by ours", goals.default_goal, one.beside_ours("trl"))
            )
        if tuned := one.tuned():
            best = min(tuned, key=lambda side: statistics.median(one.token(side)))
            what = f"the best tuned peer's time by ours ({best})"
            if goals.tuned_goal is not None:
                rows.append(_at_least(one, what, goals.tuned_goal, one.beside_ours(best)))
            for peer in goals.peer_goals.keys() & one.sides.keys():
                rows.append(
                    _at_least(one, f"{peer}'s time by ours", goals.peer_goals[peer], one.beside_ours(peer))
                )
            if goals.memory_goal is not None:
                lean = min(tuned, key=lambda side: statistics.median(_peaks(one.sides[side])))
                found = ratios(_peaks(one.sides["ours"]), _peaks(one.sides[lean]))
                what = f"our peak memory by the leanest tuned peer's ({lean})"
                rows.append(_at_most(one, what, goals.memory_goal, found))
        if goals.rate_goal is not None:
            rows.append(_at_least(one, "our tokens/s", goals.rate_goal, one.rate("ours", "real_tokens")))
        if goals.own_goal is not None and "gsm8k" in cases:
            found = ratios(one.token("ours"), cases["gsm8k"].token("ours"))
            rows.append(_at_most(one, "our time by our LoRA's", goals.own_goal, found))
        if goals.roofline_goal is not None and rates:
            found = ratios(one.useful(), (record.numbers[one.dtype] for record in rates))
            what = "our useful operations by the measured rate of products"
            rows.append(_at_least(one, what, goals.roofline_goal, found))
    return rows


def _peaks(records: Sequence[Record]) -> list[float]:
    return [float(record.peak_bytes) for record in records]


def _at_least(one: Measured, what: str, goal: float, found: list[float]) -> str:
    return _goal(one.case.title, what, "≥", goal, found, statistics.median(found) / goal)


def _at_most(one: Measured, what: str, goal: float, found: list[float]) -> str:
    return _goal(one.case.title, what, "≤", goal, found, goal / statistics.median(found))


def _goal(title: str, what: str, sign: str, goal: float, found: list[float], share: float) -> str:
    verdict = "met" if share >= 1 else f"missed, {share:.1%} of it"
    return f"| {title} | {what} | {sign} {goal:,.2f} | {spread(found, ',.2f')} | {verdict} |"


def start_rows(found: Sequence[Mapping[str, float]]) -> list[str]:
    """Return a line for each command of `starting.py`."""
    rows = []
    for name in found[0]:
        values = [one[name] for one in found]
        goal = starting.GOALS.get(name)
        if goal is None:
            rows.append(f"| start | {name} | | {spread(values, '.2f')} s | |")
        else:
            rows.append(
                _goal("start", f"{name}, seconds", "≤", goal, values, goal / statistics.median(values))
            )
    return rows


def goal_table(rows: Sequence[str]) -> str:
    """Return the table of goals."""
    return "\n".join(["| case | what | goal | measured | |", "|---|---|---|---|---|", *rows])


def share_lines(cases: Mapping[str, Measured], rates: Sequence[Record]) -> str:
    """Return the measured rates of products, and our useful share of them in every case."""
    both = ", ".join(
        f"{spread((record.numbers[dtype] / 1e12 for record in rates), '.2f')} TFLOP/s in {dtype}"
        for dtype in ("bfloat16", "float32")
    )
    lines = [f"Matrix products at the model's shapes: {both}. Useful operations of ours by that rate:", ""]
    for one in cases.values():
        found = ratios(one.useful(), (record.numbers[one.dtype] for record in rates))
        lines.append(f"- {one.case.title}: {spread(found, '.1%')}")
    return "\n".join(lines)


def restart_line(one: Measured) -> str:
    """Return what ReLoRA's restart costs, which falls into its last warm-up step."""
    at = one.warmup["ours"] - 1
    steps = one.step("ours")
    found = [record.steps[at].seconds / step for record, step in zip(one.sides["ours"], steps, strict=True)]
    return f"The step with ReLoRA's restart takes {spread(found, '.2f')} of its other steps."


def machine(device: str) -> str:
    """Return what computed: the processor or the GPU, and the libraries of ours, TRL's and PEFT's environment."""
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.machine()
    found = []
    for library in ("torch", "transformers", "peft", "trl", "bitsandbytes"):
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{library} {metadata.version(library)}")
    return f"{name}; {', '.join(found)}."


def configurations(sides: Iterable[str]) -> str:
    """Return how each side is set up."""
    known = {"ours": OURS} | PEERS
    return "\n".join(f"- **{side}**: {known[side].how}." for side in sides)


def scaling_table(scaled: Mapping[Any, Sequence[Record]], warmup: int) -> str:
    """Return tokens a second and memory of ours at every setting."""
    lines = ["| along | value | documents | rank | tokens/s | peak GB |", "|---|---|---|---|---|---|"]
    for point, records in scaled.items():
        timed = [record.steps[warmup:] for record in records]
        rates = [sum(one.real_tokens for one in steps) / sum(one.seconds for one in steps) for steps in timed]
        peaks = [record.peak_bytes / 1e9 for record in records]
        cells = [point.along, str(point.value), f"{point.rows} x {point.length}", str(point.rank)]
        lines.append(f"| {' | '.join([*cells, spread(rates, ',.0f'), spread(peaks, '.2f')])} |")
    return "### Ours by size\n\n" + "\n".join(lines)
