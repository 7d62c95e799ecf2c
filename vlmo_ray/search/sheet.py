"""A contact sheet: the results of a query as one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from vlmo_ray.search.index import Found, Index

_SIDE = 320  # of a picture, in pixels


def thumbnail(data: bytes, side: int = _SIDE) -> bytes:
    """A JPEG of an encoded image that fits into a square; empty if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.draft("RGB", (2 * side, 2 * side))
            small = picture.convert("RGB")
            small.thumbnail((side, side))
    except MemoryError:
        raise
    except Exception:  # Pillow raises errors of many kinds for damaged and for giant files
        return b""
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return out.getvalue()


def data_uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def sheet(index: Index, query: str, results: Sequence[Found], picture: bytes = b"") -> str:
    """The page. `query` is shown as text, with the picture `picture` if that was asked with."""
    shown = []
    for found in results:
        values = index.record(found).values
        image = thumbnail(values["image"]) if "image" in values else b""
        shown.append((found, data_uri(image) if image else "", values.get("text", "")))
    environment = Environment(
        loader=PackageLoader("vlmo_ray.search", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    asked = data_uri(thumbnail(picture)) if picture else ""
    return environment.get_template("sheet.html").render(
        query=query, picture=asked, results=shown, embedding=index.embedding
    )
