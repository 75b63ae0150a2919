"""The HTML and CSS of the report: pure functions from values to text; whatever comes in is escaped."""

import itertools
from collections.abc import Iterable, Sequence
from html import escape

BAR_COLORS = ("#3f9a6d", "#d9562b", "#c9a227", "#3b6fd4", "#8f6fd4", "#3aa6b0", "#8a8f98", "#5a4a42")
"""Of the parts of a bar, in order; readable on white and on black."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #5d6673; --line: #d9dde3; --page: #ffffff; --box: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --soft: #9aa3b0; --line: #333a45; --page: #14171c; --box: #1c2027; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0; }
.soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.25rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tile { background: var(--box); border-radius: .5rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem 1.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td { overflow-wrap: anywhere; }
.key { display: inline-block; margin-right: .9rem; font-size: .85rem; }
.key i { display: inline-block; width: .7rem; height: .7rem; margin-right: .35rem; border-radius: .15rem; }
pre { background: var(--box); border-radius: .5rem; padding: 1rem; overflow-x: auto; font-size: .82rem; }
details { margin-top: 2.5rem; }
summary { cursor: pointer; font-weight: 600; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document that needs nothing from anywhere: its policy lets the browser load nothing."""
    content = "\n".join(part for part in body if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{content}
</body>
</html>
"""


def heading(title: str, subtitle: str) -> str:
    """The name of the run and a line about it."""
    return f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>'


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """The few numbers to see first, as (number, what it is)."""
    cells = (f'<div class="tile"><b>{escape(number)}</b><span>{escape(name)}</span></div>' for number, name in values)
    return f'<div class="tiles">{"".join(cells)}</div>'


def section(title: str, content: str) -> str:
    """A titled part, nothing when there is no content."""
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def side_by_side(parts: Iterable[str]) -> str:
    """Puts parts beside each other where the screen is wide enough; takes HTML."""
    return f'<div class="pair">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table whose first column names its rows when there is no header; nothing when there are no rows."""
    if not rows:
        return ""
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>" if header else ""
    return f'<div class="wide"><table>{head}{"".join(_row(row, not header) for row in rows)}</table></div>'


def stacked_bar(parts: Sequence[tuple[str, float]]) -> str:
    """A bar divided as a whole is into its parts, by (name, size), and a legend; nothing for an empty whole."""
    total = sum(value for _, value in parts)
    if not total:
        return ""
    rects, legend, left = [], [], 0.0
    for (name, value), color in zip(parts, itertools.cycle(BAR_COLORS)):
        width, label = 100 * value / total, f"{escape(name)} {value / total:.1%}"
        rects.append(
            f'<rect x="{left:.3f}%" y="0" width="{width:.3f}%" height="24" fill="{color}"><title>{label}</title></rect>'
        )
        legend.append(f'<span class="key"><i style="background:{color}"></i>{label}</span>')
        left += width
    bar = f'<svg role="img" aria-label="Parts of the whole" style="height:24px">{"".join(rects)}</svg>'
    return f'{bar}<p class="soft">{" ".join(legend)}</p>'


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def paragraph(text: str) -> str:
    """A line of text."""
    return f'<p class="soft">{escape(text)}</p>'


def folded(title: str, content: str) -> str:
    """Content to open by a click."""
    return f"<details><summary>{escape(title)}</summary>\n{content}</details>" if content else ""


def _row(cells: Sequence[str], is_first_a_name: bool) -> str:
    tags = ["th" if is_first_a_name and place == 0 else "td" for place in range(len(cells))]
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for tag, cell in zip(tags, cells, strict=True)) + "</tr>"
