"""Parts of HTML pages that are one file: no script, nothing from elsewhere, images within the text, any names."""

import base64
import io
from html import escape

from PIL import Image

from runtime.text import printable

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #191919; background: #fff; max-width: 1080px; margin: 24px auto;
  padding: 0 20px }
h1 { font-size: 25px; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 20px; margin: 36px 0 8px; border-top: 1px solid #e2e2e2; padding-top: 14px; overflow-wrap: anywhere }
h3 { font-size: 16px; margin: 20px 0 6px; overflow-wrap: anywhere }
nav a { margin-right: 16px } a { color: #08519c } .soft { color: #6e6e6e; font-weight: normal }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 8px 0 }
th, td { padding: 4px 16px 4px 0; text-align: right; border-bottom: 1px solid #e2e2e2 }
th { color: #6e6e6e; font-weight: 500 } td { overflow-wrap: anywhere }
th:first-child, td:first-child { text-align: left } table.texts td, table.texts th { text-align: left }
.tiles { display: flex; flex-wrap: wrap; gap: 12px } figure { margin: 0 }
figure img { display: block; outline: 1px solid #e2e2e2 }
figcaption { font-size: 11px; color: #6e6e6e; overflow-wrap: anywhere; white-space: pre-line }
svg { display: block; max-width: 100%; height: auto; margin: 10px 0 }
"""


def page(title: str, about: str, body: str, style: str = "") -> str:
    """A whole page; `about` is a line below the title. `body` and `style` are HTML and CSS, added to STYLE."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{safe(title)}</title>'
    top = f'<h1>{safe(title)}</h1><div class="soft">{safe(about)}</div>'
    head += f"<style>{STYLE}{style}</style>"
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{top}{body}</body></html>\n'


def table(header: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table of texts, as wide as it must be. `kind`: texts for columns of words, which are on the left."""
    head = "".join(f"<th>{safe(cell)}</th>" for cell in header)
    lines = "".join(f"<tr>{''.join(f'<td>{safe(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table{kind and f" class={kind}"}><tr>{head}</tr>{lines}</table></div>'


def uri(image: Image.Image) -> str:
    """An image as the address of an `img`, a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def safe(text: str) -> str:
    return escape(printable(text))
