import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.tensors import tensor_header
from fedtune.types import CorruptFileError


def test_tensor_header_refuses_cut_and_forged_files(tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    path = tmp_path / "x.safetensors"
    whole = safetensors.torch.save({"w": torch.zeros(4, 4)})
    path.write_bytes(whole)
    assert tensor_header(path)["w"]["shape"] == [4, 4]
    path.write_bytes(whole[:-8])
    with pytest.raises(CorruptFileError, match="announced; cut off"):
        tensor_header(path)
    path.write_bytes((10**9).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptFileError, match="header of 1000000000 bytes"):
        tensor_header(path)
    path.write_bytes(b"abc")
    with pytest.raises(CorruptFileError, match="byte 0"):
        tensor_header(path)


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
        tensor_header(_forge(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("header", [b'{"a\xff": 1}', b"[" * 200_000, b'{"a": NaN}', b"", b"9" * 5000])
def test_a_header_that_is_not_json_is_a_corrupt_file(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(CorruptFileError, match=r"x\.safetensors: header"):
        tensor_header(_forge(tmp_path / "x.safetensors", header))


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
        found = tensor_header(path)
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
    assert list(tensor_header(_forge(tmp_path / "x.safetensors", header, size))) == ["a"]
