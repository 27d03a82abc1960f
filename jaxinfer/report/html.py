"""The page that every HTML report stands on: one file, no script, no outside resource, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

# All rules hang on .jaxinfer, so that a report shown inside a notebook leaves the notebook's own style alone.
_STYLE = """
.jaxinfer{--ink:#1c2330;--soft:#5b6678;--paper:#ffffff;--card:#f6f7f9;--line:#dde1e7;--before:#8a94a6;
--after:#2563c9;--good:#137a43;--bad:#b3261e;--add:#e3f5e9;--del:#fbe6e4;--hunk:#eaf0fb;
color-scheme:light dark;color:var(--ink);background:var(--paper);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,sans-serif;max-width:1180px;margin:0 auto;padding:28px 24px 48px;box-sizing:border-box}
@media(prefers-color-scheme:dark){.jaxinfer{--ink:#e4e8ef;--soft:#98a3b5;--paper:#12161d;--card:#1a202a;
--line:#2c3442;--before:#6d788b;--after:#6ea3f5;--good:#62cd90;--bad:#f28b82;--add:#14331f;--del:#3d1c1b;
--hunk:#1c2940}}
.jaxinfer *{box-sizing:border-box}
.jaxinfer h1{font-size:25px;line-height:1.25;margin:0 0 4px;font-weight:650;overflow-wrap:anywhere}
.jaxinfer h2{font-size:16px;margin:30px 0 8px;font-weight:620}
.jaxinfer p{margin:6px 0}.jaxinfer .lead{color:var(--soft);margin:0 0 8px;overflow-wrap:anywhere}
.jaxinfer .note{color:var(--soft);font-size:13px}
.jaxinfer .tiles{display:flex;flex-wrap:wrap;gap:12px;margin:18px 0 6px}
.jaxinfer .tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px;
min-width:132px}
.jaxinfer .tile b{display:block;font-size:21px;font-weight:640;font-variant-numeric:tabular-nums}
.jaxinfer .tile span{color:var(--soft);font-size:13px}
.jaxinfer .scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px}
.jaxinfer table{border-collapse:collapse;width:100%;font-size:14px;margin:0;color:inherit;background:none}
.jaxinfer th,.jaxinfer td{text-align:left;padding:6px 14px;border:0;border-bottom:1px solid var(--line);
vertical-align:top;background:none;font-variant-numeric:tabular-nums;white-space:normal}
.jaxinfer tr:last-child td{border-bottom:0}
.jaxinfer thead th{background:var(--card);color:var(--soft);font-weight:560;font-size:13px}
.jaxinfer th.right,.jaxinfer td.right{text-align:right;white-space:nowrap}
.jaxinfer .good{color:var(--good)}.jaxinfer .bad{color:var(--bad)}.jaxinfer .dim{color:var(--soft)}
.jaxinfer .strong{font-weight:640}
.jaxinfer .bars{display:grid;grid-template-columns:minmax(90px,max-content) 1fr 1fr;gap:3px 14px;
align-items:center;font-size:13px}
.jaxinfer .bars .head{color:var(--soft);font-weight:560;padding-bottom:4px}
.jaxinfer .bars .op{font-family:ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.jaxinfer .bar{display:flex;align-items:center;gap:8px;font-variant-numeric:tabular-nums}
.jaxinfer .bar i{display:block;height:13px;border-radius:3px;min-width:1px;background:var(--before)}
.jaxinfer .bar.after i{background:var(--after)}
.jaxinfer .bar .track{flex:1}
.jaxinfer .bar .number{min-width:44px;text-align:right}
.jaxinfer details{border:1px solid var(--line);border-radius:10px;margin:10px 0;overflow:hidden}
.jaxinfer summary{cursor:pointer;padding:8px 14px;background:var(--card);font-size:14px}
.jaxinfer summary code{font-family:ui-monospace,Menlo,Consolas,monospace}
.jaxinfer pre{margin:0;padding:8px 0;overflow-x:auto;font:12.5px/1.55 ui-monospace,Menlo,Consolas,monospace;
color:inherit;background:none}
.jaxinfer pre .lines{display:inline-block;min-width:100%}
.jaxinfer pre .line{display:block;padding:0 14px;white-space:pre;min-height:1.55em}
.jaxinfer pre .plus{background:var(--add)}.jaxinfer pre .minus{background:var(--del)}
.jaxinfer pre .hunk{background:var(--hunk);color:var(--soft)}
@media print{.jaxinfer{max-width:none}}
"""


def fragment(body: str) -> str:
    """Report content with its style, for a notebook cell."""
    return f'<div class="jaxinfer"><style>{_STYLE}</style>{body}</div>'


def page(title: str, body: str) -> str:
    """A whole document around report content.

    Args:
      title: The document's title, not yet escaped.
      body: HTML, already escaped.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>body{{margin:0;background:#ffffff}}"
        "@media(prefers-color-scheme:dark){body{background:#12161d}}"
        f'{_STYLE}</style></head><body><main class="jaxinfer">{body}</main></body></html>\n'
    )


def heading(title: str, lead: str = "") -> str:
    """The report's title and the line below it."""
    return f"<header><h1>{escape(title)}</h1>" + (f'<p class="lead">{escape(lead)}</p>' if lead else "") + "</header>"


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """A row of figures to be seen first: (figure, caption, tone) each."""
    cells = "".join(
        f'<div class="tile"><b{f" class={chr(34)}{tone}{chr(34)}" if tone else ""}>{escape(figure)}</b>'
        f"<span>{escape(caption)}</span></div>"
        for figure, caption, tone in entries
    )
    return f'<div class="tiles">{cells}</div>'


def bars(title: str, labels: tuple[str, str], counts: Mapping[str, tuple[int, int]], note: str = "") -> str:
    """Two columns of horizontal bars on one scale, a row for each name."""
    longest = max((max(pair) for pair in counts.values()), default=0) or 1
    rows = [f'<div class="head"></div><div class="head">{escape(labels[0])}</div>']
    rows.append(f'<div class="head">{escape(labels[1])}</div>')
    for name, pair in counts.items():
        rows.append(f'<div class="op">{escape(name)}</div>')
        for number, side in zip(pair, ("before", "after")):
            bar = f'<i style="width:{100 * number / longest:.2f}%"></i>' if number else ""
            rows.append(
                f'<div class="bar {side}"><span class="number">{number:,}</span><div class="track">{bar}</div></div>'
            )
    remark = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section><h2>{escape(title)}</h2><div class="bars">{"".join(rows)}</div>{remark}</section>'


_DIFF_CLASS = {"+": " plus", "-": " minus", "@": " hunk"}


def diff_block(title: str, lines: Iterable[str], opened: bool) -> str:
    """One collapsible, coloured piece of a unified diff."""
    lines = list(lines)
    added = sum(line.startswith("+") for line in lines)
    removed = sum(line.startswith("-") for line in lines)
    spans = "".join(f'<span class="line{_DIFF_CLASS.get(line[:1], "")}">{escape(line)}</span>' for line in lines)
    return (
        f"<details{' open' if opened else ''}><summary><code>{escape(title)}</code> "
        f'<span class="bad">−{removed:,}</span> <span class="good">+{added:,}</span></summary>'
        f'<pre><span class="lines">{spans}</span></pre></details>'
    )
