"""``/`` on the admin port: the state of the service as a page that refreshes itself.

Strategy. The page is text and tables. Its one script fetches the page again every few seconds and shows the new tables.
It says when that fails, because old numbers look like good ones. Style and script are named by their digests, and
nothing else may run or load. Everything is escaped.
"""

from __future__ import annotations

import base64
import hashlib

from tornado.escape import xhtml_escape

from tornado_fal_proxy.service.admin import AdminHandler
from tornado_fal_proxy.service.status import CLOSE_TO_FULL, Section, Share, Status, StatusSources

__all__ = ["StatusHandler"]

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#858d9b, #747d8d); --text: light-dark(#1b1f27, #e7eaf0);
        --muted: light-dark(#566073, #9aa4b5); --back: light-dark(#fff, #14171c);
        --accent: light-dark(#2f5bd0, #86a8ff); --alarm: light-dark(#a8071a, #ff9c94); }
body { max-width: 64rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
       color: var(--text); background: var(--back); }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 0 1rem; }
h1 { margin: 0; font-size: 1.3rem; }
#stale { width: 100%; }
h2 { margin: 1.75rem 0 .25rem; font-size: 1.1rem; }
p { margin: .25rem 0; color: var(--muted); }
a { color: var(--accent); }
button { padding: .3rem .9rem; font: inherit; color: var(--accent); background: var(--back);
         border: 1px solid var(--accent); border-radius: .4rem; cursor: pointer; }
#attention { margin: .75rem 0; padding: .6rem .9rem .6rem 2rem; border: 1px solid; border-radius: .4rem; }
#attention, #stale:not(:empty) { color: var(--alarm); }
#fine { margin: .75rem 0; padding: .6rem .9rem; border: 1px solid var(--line); border-radius: .4rem; color: inherit; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th, td { overflow-wrap: break-word; }
p, li, .wide td:last-child { overflow-wrap: anywhere; }
thead th { color: var(--muted); font-weight: normal; font-size: .9rem; }
tbody th { font-weight: 600; }
meter { width: 6rem; max-width: 100%; }
[hidden] { display: none; }
@media (max-width: 640px) {
  table { font-size: .9rem; }
  meter { width: 2.5rem; }
  .wide thead { display: none; }
  .wide tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .wide th, .wide td { display: block; padding: 0; border: 0; overflow-wrap: anywhere; }
  .wide td::before { content: attr(data-name) ": "; color: var(--muted); }
}
"""

# A selection of text, which somebody may be about to copy, is left alone. So is a link that has the focus.
SCRIPT = """
"use strict";
const EVERY_MS = 5000;
const byId = (id) => document.getElementById(id);
let paused = false;
async function refresh() {
  if (paused || document.hidden || !getSelection().isCollapsed) return;
  try {
    const response = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(EVERY_MS) });
    if (!response.ok) throw new Error(`status ${response.status}`);
    const main = new DOMParser().parseFromString(await response.text(), "text/html").querySelector("main");
    const focus = document.querySelector("main :focus")?.getAttribute("href");
    document.querySelector("main").replaceWith(document.adoptNode(main));
    if (focus) document.querySelector(`main [href="${focus}"]`)?.focus();
    byId("stale").textContent = "";
  } catch {
    byId("stale").textContent = "The service does not respond: the numbers below are old.";
  }
}
byId("pause").hidden = false;
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").textContent = paused ? "Refresh again" : "Pause";
  if (!paused) refresh();
});
setInterval(refresh, EVERY_MS);
"""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# The number of columns from which on a table stands as blocks on a small screen.
WIDE = 5


class StatusHandler(AdminHandler):
    """``GET /``: the state of the service."""

    def initialize(self, sources: StatusSources) -> None:
        """Take everything from which the state is read."""
        self._sources = sources

    async def get(self) -> None:
        """Respond with the page."""
        status = await self._sources.read()
        self.set_header("Content-Security-Policy", POLICY)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.respond(200, page(status).encode(), "text/html; charset=utf-8")

    head = get


def page(status: Status) -> str:
    """Return the page."""
    items = "".join(f"<li>{xhtml_escape(text)}</li>" for text in status.attention)
    attention = f'<ul id="attention">{items}</ul>' if items else '<p id="fine">Nothing needs attention.</p>'
    account = '<p><a href="usage">Who has spent how much</a></p>' if status.has_account else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>tornado-fal-proxy: status</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>'
        '<header><h1>tornado-fal-proxy: status</h1><button id="pause" type="button" hidden>Pause</button>'
        '<p id="stale" role="status"></p></header>'
        f"<main><p>{xhtml_escape(status.at)}. {xhtml_escape(status.summary)}</p>{attention}"
        f"{''.join(map(_section, status.sections))}{account}"
        '<p>For tools: <a href="metrics">metrics</a>, <a href="readyz">readyz</a>, <a href="healthz">healthz</a>.</p>'
        f"</main><script>{SCRIPT}</script></body></html>"
    )


def _section(section: Section) -> str:
    note = f"<p>{xhtml_escape(section.note)}</p>" if section.note else ""
    title = f"<h2>{xhtml_escape(section.title)}</h2>"
    if not section.rows:
        return f"{title}<p>{xhtml_escape(section.empty)}</p>{note}"
    head = "".join(f'<th scope="col">{xhtml_escape(name)}</th>' for name in section.names)
    rows = "".join(_row(section.names, row) for row in section.rows)
    wide = ' class="wide"' if len(section.names) >= WIDE else ""
    return f"{title}<table{wide}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}"


def _row(names: tuple[str, ...], row: tuple[str | Share, ...]) -> str:
    first, *others = row
    cells = "".join(
        f'<td data-name="{xhtml_escape(name)}">{_cell(cell)}</td>' for name, cell in zip(names[1:], others, strict=True)
    )
    return f'<tr><th scope="row">{_cell(first)}</th>{cells}</tr>'


def _cell(cell: str | Share) -> str:
    if not isinstance(cell, Share):
        return xhtml_escape(cell).replace("_", "_<wbr>")  # long names fit on a small screen
    value, text = min(cell, 1.0), f"{cell * 100:.0f} %"
    return f'<meter aria-label="share" value="{value:.3f}" high="{CLOSE_TO_FULL}" optimum="0">{text}</meter> {text}'
