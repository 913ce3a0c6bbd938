"""The report of `lora data` as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from lora_cli.cli.data_report import epoch_line
from lora_cli.cli.data_tokens import token_text, visible

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --trained: #1a7f37; --trained-back: #2da44e26; --dim: #808080;
  --tokens: #3b82c4; --warning: #b35900; --control: #a03db5 }
@media (prefers-color-scheme: dark) { :root { --trained: #5fd07a; --warning: #f0a04b; --control: #d78be6 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal }
td:first-child, th:first-child, .left, .wide { text-align: left; overflow-wrap: anywhere }
th, .dim { color: var(--dim) }
.bar { display: inline-block; height: .8rem; min-width: 1px; background: var(--tokens) }
.bar.trained { background: var(--trained) } td.wide { width: 16rem }
.finding { border-left: 4px solid var(--tokens); padding: .2rem .8rem; margin: .6rem 0; overflow-wrap: anywhere }
.finding.warning { border-color: var(--warning) } .finding b { text-transform: uppercase; font-size: .8rem }
.row { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: 1rem 0 }
.sides { display: flex; flex-wrap: wrap; gap: 1rem } .sides > div { flex: 1 1 20rem; min-width: 0 }
.tokens { font: 13px/1.9 ui-monospace, monospace; overflow-wrap: anywhere }
.tokens span { color: var(--dim); border-bottom: 1px dotted var(--line); margin-right: 1px }
.tokens .c { color: var(--control) }
.tokens .t { color: var(--trained); background: var(--trained-back); font-weight: bold }
.tokens small { font-size: 9px; font-weight: normal; opacity: .7; vertical-align: sub }
"""


def render(said: Mapping[str, Any]) -> str:
    """Return the page of a report."""
    body = [
        *_head(said),
        *_findings(said["findings"]),
        *_sources(said["sources"]),
        *(line for name, split in said["splits"].items() for line in _split(name, split)),
        *_epoch(said["epoch"]),
        *_rows(said["rows"]),
    ]
    title = _text(f"Data of {said['recipe']}")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>',
            f"<title>{title}</title><style>{_STYLE}</style></head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def _text(text: Any) -> str:
    return escape(visible(str(text), False))


def _token(token: Mapping[str, Any] | None) -> str:
    return "none" if token is None else f"<code>{_text(token['text'])}</code> ({token['id']})"


def _head(said: Mapping[str, Any]) -> Iterator[str]:
    tokens = said["tokens"]
    yield f"<h1>Data of {_text(said['recipe'])}</h1>"
    yield (
        f"<p>Base {_text(said['base'])}, template {said['template']}, trained: {said['train_on']}; at most"
        f" {said['max_length']:,} tokens a row, longer ones: {said['overlong']}.<br/>"
        f"Begin {_token(tokens['begin'])}, pad {_token(tokens['pad'])}, an answer ends with"
        f" {' '.join(map(_token, tokens['terminators']))}.</p>"
    )


def _findings(findings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "<h2>Findings</h2>"
    if not findings:
        yield "<p>Nothing to warn of.</p>"
    for one in findings:
        place = f'<br/><span class="dim">first: {_text(one["where"])}</span>' if one["where"] else ""
        remedy = f'<br/><span class="dim">→ {_text(one["remedy"])}</span>'
        yield (
            f'<div class="finding {one["level"]}"><b>{one["level"]}</b> {_text(one["what"])}{place}{remedy}</div>'
        )


_LEFT = dict.fromkeys(("read as", "by tokens", "by trained tokens"), ' class="left"')


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "<table>"
    yield f"<tr>{''.join(f'<th{_LEFT.get(name, str())}>{name}</th>' for name in head)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(cell if cell.startswith('<td') else f'<td>{cell}</td>' for cell in row)}</tr>"
    yield "</table>"


def _sources(sources: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "<h2>Sources</h2>"
    head = ["source", "read as", "rows", "kept", "too long", "untrained", "bad", "cut", "tokens", "trained"]
    rows = []
    for source in sources:
        counts = source["counts"]
        files = "<br/>".join(_text(name) for name in source["files"][:20])
        more = f"<br/>and {len(source['files']) - 20} more" if len(source["files"]) > 20 else ""
        form = source["format"] + (" (detected)" if source["detected"] else "")
        numbers = [counts["rows"] + counts["bad"], counts["kept"], source["too_long"], source["untrained"]]
        numbers += [counts["bad"], counts["truncated"], counts["tokens"], counts["trained_tokens"]]
        rows.append(
            [
                f'{_text(source["key"])}<br/><span class="dim">{files}{more}</span>',
                f'<td class="left">{form}<br/><span class="dim">{source["kind"]}</span></td>',
                *(f"{number:,}" for number in numbers),
            ]
        )
    yield from _table(head, rows)


def _split(name: str, split: Mapping[str, Any]) -> Iterator[str]:
    share = split["trained_tokens"] / split["tokens"]
    yield f"<h2>{'Training rows' if name == 'train' else 'Held-out rows'}</h2>"
    pairs = f" ({split['pairs']:,} pairs)" if split["pairs"] else ""
    yield (
        f"<p>{split['rows']:,} rows{pairs}, {split['tokens']:,} tokens,"
        f" {split['trained_tokens']:,} trained ({share:.1%})."
        f" {split['duplicates']['rows']:,} say what an earlier one says.</p>"
    )
    names = ("min", "median", "mean", "p95", "max")
    yield from _table(
        ["per row", "min", "median", "mean", "95 %", "max"],
        [
            [label, *(f"{split[key][one]:,.0f}" for one in names)]
            for label, key in (("tokens", "lengths"), ("trained", "trained"))
        ],
    )
    yield "<p></p>"
    histogram = split["histogram"]
    edges, tokens, trained = histogram["edges"], histogram["tokens"], histogram["trained"]
    most = max(*tokens, *trained)
    yield from _table(
        ["length", "rows", "by tokens", "rows", "by trained tokens"],
        [
            [
                f"{edges[bin]:,}-{edges[bin + 1] - 1:,}",
                f"{tokens[bin]:,}",
                _bar(tokens[bin] / most, "bar"),
                f"{trained[bin]:,}",
                _bar(trained[bin] / most, "bar trained"),
            ]
            for bin in range(len(tokens))
            if tokens[bin] or trained[bin]
        ],
    )
    yield "<p></p>"
    yield from _table(
        ["longest rows", "tokens", "trained"],
        [[_text(row["where"]), f"{row['tokens']:,}", f"{row['trained']:,}"] for row in split["longest"]],
    )


def _bar(share: float, kind: str) -> str:
    bar = f'<span class="{kind}" style="width:{100 * share:.2f}%"></span>' if share else ""
    return f'<td class="wide">{bar}</td>'


def _epoch(epoch: Mapping[str, Any] | None) -> Iterator[str]:
    if epoch is not None:
        yield "<h2>Epoch</h2>"
        yield f"<p>{epoch_line(epoch)}.</p>"


def _rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield "<h2>Rows</h2>"
    yield (
        '<p class="tokens">Every token with its id: <span class="t">trained</span> <span>not trained</span>'
        ' <span class="c">control token</span></p>'
    )
    for row in rows:
        wanted = {None: "", True: ", wanted", False: ", not wanted"}[row["wanted"]]
        yield f'<div class="row"><div>{_text(row["where"])} <span class="dim">{row["split"]}{wanted}</span></div>'
        yield '<div class="sides">'
        for side in row["sides"]:
            trained = sum(token["trained"] for token in side["tokens"])
            name = f"{side['name']}: " if side["name"] else ""
            yield f'<div><div class="dim">{name}{len(side["tokens"]):,} tokens, {trained:,} trained</div>'
            yield f'<div class="tokens">{"".join(map(_shown, side["tokens"]))}</div></div>'
        yield "</div></div>"


def _shown(token: Mapping[str, Any]) -> str:
    kind = ' class="t"' if token["trained"] else ' class="c"' if token["control"] else ""
    text = escape(token_text(token["text"], False))
    ending = "<br/>" if token["text"].endswith("\n") else "<wbr/>"
    return f"<span{kind}>{text}<small>{token['id']}</small></span>{ending}"
