"""The board as one static page: opens from disk and from any server, asks for nothing, runs only its own script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from fedtune.board.build import board
from fedtune.io import write_bytes, write_json


def _part(name: str) -> str:
    return resources.files("fedtune.board").joinpath("static", name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """Return a content-security source for an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(data: Any) -> str:
    """Return JSON that can stand inside a script element: nothing in it can end the element or start another."""
    plain = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return "".join(escapes.get(c, c) for c in plain)


def page(data: dict[str, Any]) -> str:
    """Return the page with its data, style and script inside."""
    script, style = _part("page.js"), _part("page.css")
    parts = {"script": _source(script), "style": _source(style), "css": style, "js": script, "data": embedded(data)}
    # in one pass, so that no part's own text is taken for a place
    return re.sub("@(script|style|css|js|data)@", lambda place: parts[place[1]], _part("page.html"))


def build(store: Path, out: Path) -> dict[str, Any]:
    """Build `index.html` and `board.json` from a store of entries. Raises DataError: no such folder."""
    data = board(store)
    write_json(out / "board.json", data)
    write_bytes(out / "index.html", page(data).encode())
    return data
