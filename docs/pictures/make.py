"""Draw the pictures of README.md and docs/: ``python docs/pictures/make.py`` writes the SVG files beside this one.

A drawing has two sets of colors, and the reader's browser takes the one for light or for dark. It loads nothing.
"""

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
# The colors of the sandbox's page: for light, and for dark.
COLORS = {
    "page": ("#ffffff", "#14171c"),
    "soft": ("#f4f6f9", "#1d2127"),
    "line": ("#8a93a3", "#6b7484"),
    "text": ("#1b1f27", "#e7eaf0"),
    "muted": ("#566073", "#9aa4b5"),
    "accent": ("#2f5bd0", "#86a8ff"),
}
STYLE = """
  text {{ font: 15px system-ui, sans-serif; fill: {text}; }}
  .bold {{ font-weight: 600; }}
  .small {{ font-size: 13px; fill: {muted}; }}
  .mono {{ font: 13px ui-monospace, monospace; fill: {muted}; }}
  .white, .white.bold {{ fill: #ffffff; }}
  .on {{ fill: {page}; }}
  .page {{ fill: {page}; stroke: {line}; }}
  .soft {{ fill: {soft}; stroke: {line}; }}
  .strong {{ fill: {soft}; stroke: {accent}; stroke-width: 2; }}
  .button {{ fill: {accent}; stroke: {accent}; }}
  .way {{ fill: none; stroke: {accent}; stroke-width: 2; }}
  .past {{ fill: none; stroke: {line}; stroke-width: 2; stroke-dasharray: 5 5; }}
  .tip {{ fill: {accent}; }}
  .last {{ fill: {line}; }}
"""


def picture(title: str, width: int, height: int, *shapes: str) -> str:
    """Return an SVG of that size, in pixels, whose title is its text for readers who do not see it."""
    light, dark = (STYLE.format(**{name: pair[at] for name, pair in COLORS.items()}) for at in (0, 1))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [
        f'{head} role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{light}@media (prefers-color-scheme: dark) {{{dark}}}\n</style>",
        *shapes,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def box(x: int, y: int, width: int, height: int, kind: str = "soft") -> str:
    """Return a rectangle with round corners."""
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>'


def text(x: int, y: int, words: str, kind: str = "") -> str:
    """Return a line of text that begins at ``x``."""
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>'


def arrow(path: str, kind: str = "way", tip: str = "tip") -> str:
    """Return a line with a tip at its end."""
    marker = f'<marker id="{tip}" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    head = f'<defs>{marker}<path class="{tip}" d="M0 0 8 4 0 8z"/></marker></defs>'
    return f'{head}<path class="{kind}" d="{path}" marker-end="url(#{tip})"/>'


def where() -> str:
    """Draw where the proxy stands."""
    return picture(
        "Pages and apps call the proxy without a key. The proxy adds your key and calls fal.ai. Files go directly.",
        940,
        260,
        box(10, 30, 220, 140),
        text(28, 62, "Pages and apps", "bold"),
        text(28, 90, "fal's SDKs, with proxyUrl"),
        text(28, 116, "no key", "small"),
        box(340, 10, 260, 180, "strong"),
        text(358, 42, "tornado-fal-proxy", "bold"),
        text(358, 70, "a process of its own, or"),
        text(358, 92, "a handler in your application"),
        text(358, 120, "your fal key", "small"),
        text(358, 142, "access rules and limits", "small"),
        text(358, 164, "log and metrics", "small"),
        box(720, 30, 210, 140),
        text(738, 62, "fal.ai", "bold"),
        text(738, 90, "models, queue, tokens"),
        text(738, 116, "storage of files", "small"),
        arrow("M230 100H336"),
        text(242, 90, "your route", "small"),
        arrow("M600 100H716"),
        text(608, 90, "TLS, your key", "small"),
        arrow("M120 170V230H825V174", "past", "last"),
        text(270, 222, "pictures and uploaded files: directly, at addresses that fal gives out", "small"),
    )


def field(y: int, label: str, value: str, x: int = 37, width: int = 566) -> list[str]:
    """Return a field of the sandbox's page, with its label."""
    return [text(x, y, label, "small"), box(x, y + 8, width, 32, "page"), text(x + 10, y + 29, value)]


def sandbox() -> str:
    """Draw the sandbox's page after its first picture."""
    log = ["Loading the model", "Step 1 of 3", "Step 2 of 3", "Step 3 of 3", "Done"]
    gradient = '<linearGradient id="sky" x2="0" y2="1"><stop stop-color="#193640"/>'
    gradient += '<stop offset="1" stop-color="#526fcc"/></linearGradient>'
    return picture(
        "The sandbox's page: a form with a model and a prompt, the log of the job, and the picture that came",
        640,
        550,
        box(1, 1, 638, 548, "page"),
        "<style>.title { font-size: 21px; font-weight: 600; } .form { font-size: 17px; font-weight: 600; }</style>",
        text(21, 40, "tornado-fal-proxy: sandbox", "title"),
        text(21, 66, "These calls go through the proxy at /api/fal/proxy to a stand-in for fal.ai.", "small"),
        text(21, 86, "They need no key and no network, and they cost nothing.", "small"),
        box(21, 104, 598, 426),
        text(37, 134, "Make a picture through the queue", "form"),
        *field(162, "Model", "fal-ai/flux/dev"),
        *field(222, "Prompt", "A lighthouse in a snow storm"),
        box(37, 274, 64, 34, "button"),
        text(55, 296, "Run", "on"),
        box(107, 274, 78, 34, "page"),
        text(122, 296, "Cancel"),
        text(37, 336, "Completed"),
        *(text(37, 362 + 20 * at, f"08:02:{19 + at // 2}  {line}", "mono") for at, line in enumerate(log)),
        f"<defs>{gradient}</defs>",
        '<rect x="287" y="274" width="316" height="237" rx="6" fill="url(#sky)"/>',
        '<text class="white bold" text-anchor="middle" x="445" y="398">A lighthouse in a snow storm</text>',
    )


PICTURES = {"where.svg": where, "sandbox.svg": sandbox}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), "utf-8")
