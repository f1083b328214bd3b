import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune import io
from fedtune.types import CorruptFileError, LockedError


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    io.write_json(path, {"a": 1})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        io.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_nan_becomes_null_and_is_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    io.write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert io.read_json(path) == {"a": None, "b": [None, 1.5]}
    path.write_text('{"a": NaN}')
    with pytest.raises(CorruptFileError, match=r"x\.json.*NaN"):
        io.read_json(path)


def test_corrupt_json_names_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(CorruptFileError, match=r"x\.json: line 2, column 7"):
        io.read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CorruptFileError, match="byte 7 is not UTF-8"):
        io.read_json(path)
    with pytest.raises(CorruptFileError, match="No such file"):
        io.read_json(tmp_path / "absent.json")


def test_oversized_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" + "1," * 100 + "1]")
    with pytest.raises(CorruptFileError, match="203 bytes, more than the 100"):
        io.read_text(path, max_bytes=100)


def test_a_torn_last_line_is_dropped_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    io.append_lines(path, [{"a": 1}, {"a": 2}])
    with open(path, "a") as handle:
        handle.write('{"a": ')
    assert io.read_lines(path, torn_tail=True) == [{"a": 1}, {"a": 2}]
    with pytest.raises(CorruptFileError, match="line 3"):
        io.read_lines(path)


BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\n\x00\ufeff"
HALVES = "\ud800\udfff"
TEXTS = st.text(st.one_of(st.characters(), st.sampled_from(BREAKS + HALVES)))


def _joined(text: str) -> str:
    """Return the text as JSON has it: two halves of one character that stand side by side are that character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(TEXTS.map(_joined), TEXTS.map(_joined), max_size=2)))
def test_every_text_comes_back_from_json_and_from_json_lines(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    path = tmp_path / "x"
    io.write_lines(path, rows)
    io.append_lines(path, rows)
    assert io.read_lines(path) == rows * 2
    assert path.read_text(encoding="utf-8").splitlines() == path.read_bytes().decode().split("\n")[:-1]
    io.write_json(path, rows)
    assert io.read_json(path) == rows


@pytest.mark.parametrize("odd", [*BREAKS, *HALVES])
def test_lines_written_by_others_end_only_at_a_line_feed(tmp_path: Path, odd: str) -> None:
    rows = [{"a": f"x{odd}y"}, {"a": 1}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=odd in "\r\n\x00\x0b\x0c\x1c\x1d\x1e" + HALVES) for row in rows)
    (tmp_path / "x.jsonl").write_bytes(text.encode())
    assert io.read_lines(tmp_path / "x.jsonl") == rows


def test_a_last_line_cut_inside_a_character_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"a": 1}\n{"a": "é'.encode()[:-1])
    assert io.read_lines(path, torn_tail=True) == [{"a": 1}]
    with pytest.raises(CorruptFileError, match="line 2: byte 7 is not UTF-8"):
        io.read_lines(path)


def test_digest_is_of_the_canonical_form() -> None:
    assert io.digest({"b": 1, "a": [1.0, "é"]}) == io.digest({"a": [1.0, "é"], "b": 1})
    assert io.digest({"a": 1}) != io.digest({"a": 1.5})


def test_tensor_header_refuses_cut_and_forged_files(tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    path = tmp_path / "x.safetensors"
    whole = safetensors.torch.save({"w": torch.zeros(4, 4)})
    path.write_bytes(whole)
    assert io.tensor_header(path)["w"]["shape"] == [4, 4]
    path.write_bytes(whole[:-8])
    with pytest.raises(CorruptFileError, match="announced; cut off"):
        io.tensor_header(path)
    path.write_bytes((10**9).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptFileError, match="header of 1000000000 bytes"):
        io.tensor_header(path)
    path.write_bytes(b"abc")
    with pytest.raises(CorruptFileError, match="byte 0"):
        io.tensor_header(path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FORGED = [
    [],
    7,
    {"a": None},
    {"a": []},
    {"a": {}},
    {"a": {**ENTRY, "data_offsets": [8]}},
    {"a": {**ENTRY, "data_offsets": None}},
    {"a": {**ENTRY, "data_offsets": ["0", "8"]}},
    {"a": {**ENTRY, "data_offsets": [0.0, 8.0]}},
    {"a": {**ENTRY, "data_offsets": [False, 8]}},
    {"a": {**ENTRY, "data_offsets": [-8, 0]}},
    {"a": {**ENTRY, "data_offsets": [0, 10**30]}},
    {"a": {**ENTRY, "shape": [-1, -2]}},
    {"a": {**ENTRY, "shape": [3]}},
    {"a": {**ENTRY, "shape": [2**62, 2**62]}},
    {"a": {**ENTRY, "shape": [0, 10**30], "data_offsets": [0, 0]}},
    {"a": {**ENTRY, "shape": [[2]]}},
    {"a": {**ENTRY, "dtype": "F33"}},
    {"a": {**ENTRY, "dtype": ["F32"]}},
    {"a": ENTRY, "b": ENTRY},
    {"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}},
    {"a": ENTRY, "__metadata__": [1]},
    {"a": ENTRY, "__metadata__": {"a": {"b": 1}}},
    {str(i): None for i in range(100_000)},
]


def _forge(path: Path, header: Any, size: int = 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


@pytest.mark.parametrize("header", FORGED)
def test_a_forged_header_is_a_corrupt_file(tmp_path: Path, header: Any) -> None:
    with pytest.raises(CorruptFileError, match=r"x\.safetensors"):
        io.tensor_header(_forge(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("header", [b'{"a\xff": 1}', b"[" * 200_000, b'{"a": NaN}', b"", b"9" * 5000])
def test_a_header_that_is_not_json_is_a_corrupt_file(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(CorruptFileError, match=r"x\.safetensors: header"):
        io.tensor_header(_forge(tmp_path / "x.safetensors", header))


WILD = st.one_of(st.none(), st.booleans(), st.integers(-9, 40), st.floats(), st.text(max_size=3), st.just(2**64))
PLACES = st.one_of(st.lists(st.one_of(st.sampled_from([0, 4, 8, 16]), WILD), max_size=3), WILD)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.one_of(st.sampled_from(["F32", "F16", "F64", "U8"]), WILD), "shape": PLACES, "data_offsets": PLACES}
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.one_of(ENTRIES, WILD), max_size=3), st.sampled_from([0, 8, 16]))
def test_what_a_header_check_lets_through_can_be_opened(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    import safetensors

    path = _forge(tmp_path / "x.safetensors", header, size)
    try:
        found = io.tensor_header(path)
    except CorruptFileError:
        return
    with safetensors.safe_open(path, framework="numpy") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == {  # noqa: SIM118
            name: entry["shape"] for name, entry in found.items()
        }


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F4", [2, 4], 4), ("F6_E2M3", [4], 3), ("F8_E8M0", [4], 4)])
def test_numbers_of_less_than_a_byte_are_counted_in_bits(
    tmp_path: Path, dtype: str, shape: list[int], size: int
) -> None:
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    assert list(io.tensor_header(_forge(tmp_path / "x.safetensors", header, size))) == ["a"]


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom fedtune.io import folder_lock\nfrom fedtune.types import LockedError\n"
        f"try:\n    with folder_lock(Path({str(tmp_path)!r})): print('got it')\n"
        "except LockedError as err: print(err)\n"
    )
    with io.folder_lock(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"in use by pid {os.getpid()} on " in other.stdout
    after = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert after.stdout.strip() == "got it"
    assert issubclass(LockedError, Exception)
