"""What `lora inspect` prints: aligned columns of at most 100 characters, spectra as small pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

WIDTH = 100
LAYERS = 40
"""Most columns of the picture of the layers; neighbours of a deeper model share one."""
BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.:-=+*#"
"""Levels of a picture, and those of a terminal that can only show ASCII."""

Row = list[str]


def lines(found: Mapping[str, Any], *, every: bool, encoding: str) -> list[str]:
    """Return the lines for what was found in a target: a row for each kind of module, or for `every` module."""
    levels = _levels(encoding)
    text = [_headline(found), ""]
    if found["modules"]:
        over = {} if every else {"|dW|/|W|": (6, 8), "for 99%": (9, 11)}
        text += _table(_module_rows(found, levels) if every else _kind_rows(found, levels), over)
    if found["whole"]:
        text += ["", *_table(_whole_rows(found["whole"], every=every), {"|dW|/|W|": (3, 5)})]
    if len(found["layers"]) > 1:
        text += ["", _depth(found["layers"], levels)]
    if found["unchanged"]:
        text.append(f"{found['unchanged']} tensors are as they were in the base.")
    return [*text, "", *_conclusion(found)]


def _headline(found: Mapping[str, Any]) -> str:
    modules = found["modules"]
    count = f"{len(modules)} modules" + (f" and {len(found['whole'])} tensors" if found["whole"] else "")
    return f"{found['method']}{_ranks(modules)}: {count}, {found['parameters']:,} parameters"


def _ranks(modules: Sequence[Mapping[str, Any]]) -> str:
    ranks = [module["rank"] for module in modules if module["rank"] is not None]
    if not ranks:
        return ""
    first, sums = modules[0]["initial_rank"], [module["update_rank"] for module in modules]
    text = f" of rank {_span(ranks)}"
    if first is not None:
        text += f" (mean {sum(ranks) / len(ranks):.1f}, from {first})"
    elif sums != ranks:
        text += f" (updates of rank {_span(sums)})"
    return text


def _kind_rows(found: Mapping[str, Any], levels: str) -> list[Row]:
    names = ["kind", "n", "out x in", "params", "rank", "share", "min", "median", "max"]
    rows = [[*names, "min", "med", "max", "eff", "spectrum", "verdict"]]
    for kind in found["kinds"]:
        change, used, rank = kind["relative_change"], kind["rank_99"], kind["update_rank"]
        rows.append(
            [
                kind["kind"],
                str(kind["modules"]),
                "varies" if kind["shape"] is None else _shape(*kind["shape"]),
                _count(kind["parameters"]),
                _span([rank["min"], rank["max"]]) if _has_rank(found) else "-",
                f"{100 * kind['share']:.0f}%",
                *(_percent(change[name]) for name in ("min", "median", "max")),
                *(f"{used[name]:.0f}" for name in ("min", "median", "max")),
                f"{kind['effective_rank']['median']:.1f}",
                _picture(kind["profile"], levels),
                kind["verdict"] or ("mixed" if any(kind["verdicts"].values()) else "-"),
            ]
        )
    return rows


def _module_rows(found: Mapping[str, Any], levels: str) -> list[Row]:
    rows = [["module", "out x in", "params", "rank", "|dW|/|W|", "for 99%", "eff", "spectrum", "verdict"]]
    modules = found["modules"]
    # The beginning that all have in common says nothing: `model.layers.`
    parts = [module["path"].split(".") for module in modules]
    same = 0
    while all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    for module, part in zip(modules, parts, strict=True):
        spectrum = module["low_rank"] or module["update"]
        suggested = "" if module["suggested_rank"] is None else f", {module['suggested_rank']}"
        rows.append(
            [
                ".".join(part[same:]),
                _shape(module["out_features"], module["in_features"]),
                _count(module["parameters"]),
                "-" if module["rank"] is None else str(module["update_rank"]),
                _percent(module["relative_change"]),
                str(spectrum["rank_99"]),
                f"{spectrum['effective_rank']:.1f}",
                _picture(spectrum["profile"], levels),
                f"{module['verdict'] or '-'}{suggested}",
            ]
        )
    return rows


def _whole_rows(whole: Sequence[Mapping[str, Any]], *, every: bool) -> list[Row]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for tensor in whole:
        parts = [part for part in tensor["name"].split(".") if not part.isdigit()]
        groups.setdefault(tensor["name"] if every else ".".join(parts[-2:]), []).append(tensor)
    rows = [["trained whole", "n", "params", "min", "median", "max"]]
    for name, group in groups.items():
        known = [tensor["relative_change"] for tensor in group if tensor["relative_change"] is not None]
        changes = [min(known), median(known), max(known)] if known else [None] * 3
        size = _count(sum(tensor["parameters"] for tensor in group))
        rows.append([name, str(len(group)), size, *map(_percent, changes)])
    return rows


def _depth(layers: Sequence[Mapping[str, Any]], levels: str) -> str:
    """Return the change of the layers, the first on the left, and where it is least and most."""
    known = [layer for layer in layers if layer["relative_change"] is not None]
    if not known:
        return "by layer: the base's weights are zero"
    changes = [layer["relative_change"] for layer in known]
    least, most = (known[changes.index(pick(changes))] for pick in (min, max))
    columns = _means(changes, LAYERS)
    top = max(columns)
    drawn = _picture([column / top if top else 0.0 for column in columns], levels)
    low, high = (f"{_percent(layer['relative_change'])} (layer {layer['layer']})" for layer in (least, most))
    return f"|dW|/|W| by layer {layers[0]['layer']}-{layers[-1]['layer']}  {drawn}  least {low}, most {high}"


def _conclusion(found: Mapping[str, Any]) -> list[str]:
    """Return what the columns mean where it is needed, and what follows for the recipe."""
    text = [
        "share: of all modules' |dW|^2. for 99%: directions that hold 99 % of |dW|^2. eff: effective rank.",
    ]
    if any(module["low_rank"] for module in found["modules"]):
        text.append(
            "Both, and the spectrum, are of the part that the rank bounds; --json has the whole update's."
        )
    verdicts = {module["verdict"] for module in found["modules"]} - {None}
    if "wasted" in verdicts:
        text.append("wasted: they are at most 0.4 of the rank; a smaller one would have held the update.")
    if "short" in verdicts:
        text.append("short: the spectrum is flat to its end. Raise the rank if the loss has stopped falling.")
    if "zero" in verdicts:
        text.append("zero: no update at all; the adapter does nothing there.")
    if found["suggestion"]:
        text.append("Suggested in the recipe's adapter block (alpha / rank stays):")
        text += [f"  {key}: {_yaml(value)}" for key, value in found["suggestion"].items()]
    elif verdicts - {"zero"}:
        text.append("Suggested: no other rank; no kind of module is clearly wasted or short.")
    return text


def _table(rows: Sequence[Row], over: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return rows in columns; words flush left, numbers flush right, the first column cut to keep WIDTH.

    `over` are headings above several columns, with the first and the last of them.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = max(4, min(widths[0], WIDTH - len(widths) + 1 - sum(widths[1:])))
    words = {0, *(column for column, name in enumerate(rows[0]) if name in ("spectrum", "verdict"))}
    text = []
    if over:
        starts = [sum(widths[:column]) + column for column in range(len(widths) + 1)]
        above = ""
        for heading, (start, end) in over.items():
            room = starts[end + 1] - 1 - starts[start]
            above = above.ljust(starts[start]) + heading.center(room)
        text.append(above.rstrip())
    for row in rows:
        name = row[0] if len(row[0]) <= widths[0] else ".." + row[0][2 - widths[0] :]
        cells = zip([name, *row[1:]], widths, strict=True)
        text.append(
            " ".join(
                cell.ljust(width) if column in words else cell.rjust(width)
                for column, (cell, width) in enumerate(cells)
            ).rstrip()
        )
    return text


def _levels(encoding: str) -> str:
    try:
        BLOCKS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return BLOCKS


def _picture(parts: Sequence[float], levels: str) -> str:
    """Return a character for each number from 0 to 1."""
    return "".join(levels[min(int(part * len(levels)), len(levels) - 1)] for part in parts)


def _means(values: Sequence[float], most: int) -> list[float]:
    """Return at most `most` means of neighbours."""
    number = min(most, len(values))
    edges = [round(index * len(values) / number) for index in range(number + 1)]
    parts = [values[first:last] for first, last in pairwise(edges)]
    return [sum(part) / len(part) for part in parts]


def _has_rank(found: Mapping[str, Any]) -> bool:
    return any(module["rank"] is not None for module in found["modules"])


def _yaml(value: float | Mapping[str, float]) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {number}" for key, number in value.items()) + "}"
    return str(value)


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _shape(outer: int, inner: int) -> str:
    return f"{outer} x {inner}"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _percent(part: float | None) -> str:
    """Return a part of 1 in at most 6 characters."""
    if part is None:
        return "-"
    if part >= 10:
        return f"{part:.0f}x"
    if 0 < part < 0.0001:
        return "<0.01%"
    return f"{100 * part:.{2 if part < 0.1 else 1 if part < 1 else 0}f}%"
