"""The frame of a self-contained HTML page: style, pictures within it, a table of facts, writing it whole."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from bgen.evaluate.reports.pictures import png
from bgen.files import write_result

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #222;
  background: #fff; max-width: 1000px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }}
h1 {{ font-size: 1.75rem; line-height: 1.25; margin: 0 0 .75rem; }}
h2 {{ font-size: 1.2rem; margin: 2.75rem 0 .5rem; }}
p {{ margin: .5rem 0; max-width: 46rem; }}
.headline {{ font-size: 1.2rem; }}
.note {{ border-left: 3px solid #E69F00; padding-left: .8rem; }}
.small, figcaption {{ color: #595959; font-size: .875rem; }}
figure {{ margin: .75rem 0 0; }}
figure img {{ display: block; width: 100%; height: auto; }}
figure.narrow img {{ width: 62%; }}
figcaption {{ max-width: 46rem; margin-top: .4rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; width: 100%; margin-top: .75rem; }}
th {{ text-align: left; font-weight: 600; border-bottom: 2px solid #222; padding: .35rem .6rem .35rem 0; }}
td {{ border-bottom: 1px solid #e5e5e5; padding: .4rem .6rem .4rem 0; vertical-align: top; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td:first-child {{ min-width: 14rem; }}
td .meaning {{ color: #595959; font-size: .8rem; display: block; line-height: 1.35; }}
th.strip {{ white-space: nowrap; }}
.sd {{ color: #767676; font-size: .8em; }}
.key {{ display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .3em; }}
.best {{ color: #00664b; font-weight: 600; }} .good {{ color: #00664b; }} .even {{ color: #7a4f00; }}
.bad {{ color: #a31515; font-weight: 600; }}
@media (max-width: 640px) {{
  body {{ padding: 1.25rem .9rem 3rem; }} h1 {{ font-size: 1.4rem; }} .headline {{ font-size: 1.05rem; }}
  figure.narrow img {{ width: 100%; }} table {{ font-size: .78rem; }} td:first-child {{ min-width: 5rem; }}
  th, td {{ padding-right: .4rem; }} td:first-child .meaning, .sd, .strip {{ display: none; }}
}}
table.facts {{ width: auto; }} table.facts td:first-child {{ min-width: 0; color: #595959; padding-right: 1.5rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="headline">{headline}</p>
{body}
</body>
</html>
"""


def write_page(path: str | Path, title: str, headline: str, parts: Sequence[str]) -> Path:
    """Write the page, whole or not at all, and return its path; ``parts`` are HTML, title and headline plain text."""
    page = _PAGE.format(title=escape(title), headline=escape(headline), body="\n".join(parts))
    target = Path(path)
    write_result(target, page)
    return target


def figure(drawn: Figure, alternative: str, caption: str) -> str:
    """Return a picture with its caption."""
    encoded = base64.b64encode(png(drawn, dpi=160)).decode("ascii")
    narrow = ' class="narrow"' if drawn.get_figwidth() < 8 else ""
    image = f'<img alt="{escape(alternative)}" src="data:image/png;base64,{encoded}">'
    return f"<figure{narrow}>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def facts_table(facts: Mapping[str, object]) -> str:
    """Return the section that says how the page was made."""
    rows = "\n".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in facts.items()
    )
    return f'<h2>How this was made</h2>\n<table class="facts"><tbody>\n{rows}\n</tbody></table>'
