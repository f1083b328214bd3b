"""Seeded damage to files: what disks, editors, transfers and hostile hands do to bytes, JSON, JSON lines, TOML and gzip.

`damaged(data, seed)` returns one damaged copy and what was done to it; the same seed gives the same damage. A reader
passes if each copy ends in a value, a report or a `FedtuneError`: never in another exception, and never in silence.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

Change = Callable[[bytes, random.Random], bytes]
DEEP = "[" * 3000 + "]" * 3000
# what a value of another kind may be; texts stand for themselves in JSON, so that no library can be kind to them
VALUES = (
    *("null", "true", "false", "0", "-1", "1", "0.5", "-0.0", "1e400", "-1e400", "NaN", "Infinity"),
    *("9" * 25, "9" * 5000, "1e-400", "18446744073709551616", "4503599627370497.5", DEEP),
    *('""', '"x"', '"0"', '"\\ud800"', '"a\\u0000b"', '"\\u202e\\u2066"', '"\\u2028\\u0085"', '"<script>"', '"=1+1"'),
    *('"../../etc/passwd"', '"\\u001b[31m"', '"javascript:alert(1)"', '"' + "x" * 5000 + '"', '"{0} %s {x}"'),
    *("[]", "{}", "[[]]", "[null]", "[{}]", '{"": {}}', '{"__proto__": 1}', "[1, 2, 3]", '["x"]'),
)


def _span(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.choice((1, 2, 8, 64, 1024)))


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One to four bits turned."""
    raw = bytearray(data)
    for _ in range(draw.randint(1, 4) if raw else 0):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(raw)


def cut_off(data: bytes, draw: random.Random) -> bytes:
    """The end is missing; sometimes all of it."""
    return data[: draw.choice((0, 1, len(data) // 2, max(0, len(data) - 1), draw.randrange(len(data) + 1)))]


def cut_out(data: bytes, draw: random.Random) -> bytes:
    """A piece is missing."""
    start, end = _span(data, draw)
    return data[:start] + data[end:]


def doubled(data: bytes, draw: random.Random) -> bytes:
    """A piece, or the whole file, is there twice."""
    start, end = draw.choice(((0, len(data)), _span(data, draw)))
    return data[:end] + data[start:]


def overwritten(data: bytes, draw: random.Random) -> bytes:
    """A piece is NUL, 0xFF or noise, as after a crash of the file system."""
    start, end = _span(data, draw)
    fill = draw.choice((b"\0", b"\xff", draw.randbytes(1)))
    return data[:start] + fill * (end - start) + data[end:]


def put_in(data: bytes, draw: random.Random) -> bytes:
    """Bytes that text must not have stand somewhere in it."""
    place = draw.randrange(len(data) + 1)
    odd = (b"\0", b"\xed\xa0\x80", b"\xff\xfe", b"\xc3", b"\x1b[31m", b"\r", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\n\n")
    return data[:place] + draw.choice(odd) + data[place:]


def retold(data: bytes, draw: random.Random) -> bytes:
    """Another way to write the same text: a byte-order mark, Windows' line ends, UTF-16, other line ends, zipped."""
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.replace(b"\n", b"\r\n"),
        lambda: data.replace(b"\n", b"\r"),
        lambda: data.decode("utf-8", "replace").encode("utf-16"),
        lambda: gzip.compress(data, mtime=0),
        lambda: data.strip() + b"\n\n\n",
    )
    return draw.choice(ways)()


BYTES: tuple[Change, ...] = (flipped, cut_off, cut_out, doubled, overwritten, put_in, retold)


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield from _places(value, (*path, key))


_MARK = "damaged-here-7d1f"


def _at(node: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> None:
    for key in path[:-1]:
        node = node[key]
    change(node, path[-1])


def other_value(tree: Any, draw: random.Random) -> str:
    """Return the JSON text of a tree in which one value is of another kind, missing, or under another name."""
    places = [p for p in _places(tree) if p]
    how = draw.choice(("swap", "swap", "swap", "swap", "drop", "rename", "repeat", "whole"))
    if not places or how == "whole":
        return draw.choice(VALUES)
    path = draw.choice(places)

    def change(node: Any, key: Any) -> None:
        if how == "drop":
            del node[key]
        elif how == "rename" and isinstance(node, dict):
            node[draw.choice(("", "__proto__", str(key).upper(), f"{key} ", "x" * 500))] = node.pop(key)
        elif how == "repeat" and isinstance(node, list):
            node[key:key] = [node[key]] * draw.choice((1, 50))
        else:
            node[key] = _MARK

    _at(tree, path, change)
    text = json.dumps(tree, ensure_ascii=False)
    return text.replace(f'"{_MARK}"', draw.choice(VALUES))


def json_changed(data: bytes, draw: random.Random) -> bytes:
    """One value of a JSON document is another. Raises ValueError where it is none."""
    return other_value(json.loads(data), draw).encode("utf-8", "surrogatepass")


def lines_changed(data: bytes, draw: random.Random) -> bytes:
    """One value of a line, or the order, number or kind of the lines is another. Raises ValueError."""
    lines = data.decode("utf-8").split("\n")
    place = draw.randrange(max(1, len(lines) - 1))
    how = draw.choice(("value", "value", "value", "value", "drop", "twice", "swap", "array", "blank"))
    if how == "value":
        lines[place] = other_value(json.loads(lines[place]), draw)
    elif how == "drop":
        del lines[place]
    elif how == "twice":
        lines.insert(place, lines[place])
    elif how == "swap":
        lines[0], lines[place] = lines[place], lines[0]
    elif how == "array":
        lines = ["[" + ",".join(line for line in lines if line) + "]"]
    else:
        lines.insert(place, draw.choice(("", "   ", "null", "[]", "{", "{}")))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def toml_changed(data: bytes, draw: random.Random) -> bytes:
    """One value or line of a settings file is another. Raises ValueError where there is none."""
    text = data.decode("utf-8")
    found = list(re.finditer(r"(?m)^[\w.\"-]+ = (.*)$", text))
    if not found:
        raise ValueError("no settings in it")
    one = draw.choice(found)
    how = draw.choice(("swap", "swap", "swap", "drop", "twice", "unknown"))
    if how == "unknown":
        return f'{draw.choice(("", "[[x]]", "[nothing]"))}\n"odd key" = 1\n{text}'.encode()
    value = draw.choice((*VALUES, "nan", "inf", "1979-05-27", "[1, [2]]", "{a = 1}", "''"))
    new = {"swap": one[0].replace(one[1], value), "drop": "", "twice": f"{one[0]}\n{one[0]}"}[how]
    return (text[: one.start()] + new + text[one.end() :]).encode("utf-8", "surrogatepass")


STRUCTURE: tuple[Change, ...] = (json_changed, lines_changed, toml_changed)


def _once(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Damage the bytes, or what they say where that can be read."""
    if data[:2] == b"\x1f\x8b" and draw.random() < 0.6:
        name, inner = _once(gzip.decompress(data), draw)
        return f"gzip of {name}", gzip.compress(inner, mtime=0)
    order = [*draw.sample(STRUCTURE, len(STRUCTURE))] if draw.random() < 0.6 else []
    for change in order:
        try:
            return change.__name__, change(data, draw)
        except (ValueError, KeyError, RecursionError):
            continue
    change = draw.choice(BYTES)
    return change.__name__, change(data, draw)


def damaged(data: bytes, seed: int) -> tuple[str, bytes]:
    """Return what was done, and a copy of the data that is not the same bytes (an empty file may stay one)."""
    draw = random.Random(seed)
    for _ in range(20):
        name, copy = _once(data, draw)
        if copy != data:
            return name, copy
    return "cut_off", b""


def copies(data: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield damaged copies, each by a seed of its own."""
    for number in range(count):
        yield damaged(data, seed * 1_000_003 + number)
