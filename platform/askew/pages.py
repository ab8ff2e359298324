"""Pages for people: one HTML document that fetches and runs nothing, in light and in dark.

Knows nothing of what it shows.
"""

import html
import json
import re

MAX_CHARACTERS = 2000
INK, BAR = "#010203", "#040506"  # colours of a drawing that take on the page's
STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5a6472; --paper: #fff; --line: #d9dee5; --bar: #3b6fb6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #a3adba; --paper: #14181f; --line: #353d49; --bar: #7fb0ee }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem; margin: 0 0 .5rem }
.grid { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.wide { overflow-x: auto } figure { margin: 0 } svg { width: 100%; height: auto }
svg text { font-family: inherit !important }
figcaption, caption { color: var(--soft); font-size: .875rem; text-align: start }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); text-align: start;
  vertical-align: top; overflow-wrap: anywhere }
thead th { color: var(--soft); font-weight: 600 } tbody th { font-weight: 400 }
.number { width: 1%; padding-inline: .6rem 0; text-align: end; white-space: nowrap;
  font-variant-numeric: tabular-nums }
.facts th { width: 30% } .measures th, .measures td { white-space: nowrap; width: auto }
.share { display: block; height: .3rem; margin-top: .2rem; background: var(--bar) }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, body: str, style: str = "") -> str:
    """Make a page of a title and of HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
<h1>{text(title)}</h1>
{body}</main>
</body>
</html>
"""


def text(value: object) -> str:
    """Escape a value for the page: as text of a bounded length, without control characters."""
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    shown = shown.encode("utf-8", "replace").decode()
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", shown)
    if len(shown) > MAX_CHARACTERS:
        shown = shown[:MAX_CHARACTERS] + "…"
    return html.escape(shown)


def figure(svg: str, label: str, caption: str) -> str:
    """Show a drawing of matplotlib, made with INK and BAR, with what it shows in words."""
    svg = svg[svg.index("<svg") :].replace(INK, "var(--ink)").replace(BAR, "var(--bar)")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in each plot, and nothing refers to them
    named = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
    return f"<figure>{named}<figcaption>{text(caption)}</figcaption></figure>"
