"""The damage itself: seeded, always another file, and of every kind."""

import gzip
import json

from tests.faults.mutate import BYTES, STRUCTURE, copies, damaged

DOCUMENT = json.dumps({"a": [1, {"b": "x"}], "c": None}, indent=1).encode()
LINES = b'{"a": 1}\n{"a": 2, "b": [3]}\n{"a": 3}\n'
SETTINGS = b'domain = "finance"\n[train]\nmax_steps = 6\n'


def test_the_same_seed_gives_the_same_damage_and_never_the_same_file() -> None:
    for data in (DOCUMENT, LINES, SETTINGS, gzip.compress(LINES, mtime=0), b"\x00\x01binary\xff", b"x"):
        for seed in range(200):
            name, copy = damaged(data, seed)
            assert copy != data, (name, seed)
            assert damaged(data, seed) == (name, copy)


def test_every_kind_of_damage_comes_up() -> None:
    seen = {name for data in (DOCUMENT, LINES, SETTINGS) for name, _ in copies(data, 400)}
    assert seen == {change.__name__ for change in (*BYTES, *STRUCTURE)}
    assert any(name.startswith("gzip of") for name, _ in copies(gzip.compress(LINES, mtime=0), 50))
