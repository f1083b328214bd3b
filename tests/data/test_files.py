import gzip
from pathlib import Path

import pytest

from fedtune.data import files
from fedtune.types import CorruptFileError, DataError

ROWS = [{"a": "1", "b": "x\u2028y"}, {"a": "2", "b": "é"}]


def _write(path: Path, text: str, zipped: bool) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_every_kind_reads_the_same_rows(tmp_path: Path, zipped: bool) -> None:
    import json

    end = ".gz" if zipped else ""
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)
    assert files.read_rows(_write(tmp_path / f"x.jsonl{end}", lines, zipped)) == ROWS
    assert files.read_rows(_write(tmp_path / f"x.json{end}", json.dumps(ROWS), zipped)) == ROWS
    assert files.read_rows(_write(tmp_path / f"x.csv{end}", "a,b\n1,x\u2028y\n2,é\n", zipped)) == ROWS


def test_parquet_reads_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    assert files.read_rows(tmp_path / "x.parquet") == ROWS
    (tmp_path / "y.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CorruptFileError, match=r"y\.parquet: not a Parquet file"):
        files.read_rows(tmp_path / "y.parquet")


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    assert files.read_rows(_write(tmp_path / "array.jsonl", '[{"a": 1}]', True)) == [{"a": 1}]


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"x\.jsonl: line 2"):
        files.read_rows(_write(tmp_path / "x.jsonl", '{"a": 1}\n{"a": \n', False))
    with pytest.raises(CorruptFileError, match="row 1 is int"):
        files.read_rows(_write(tmp_path / "x.json", "[1]", False))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(CorruptFileError, match="not a whole gzip file"):
        files.read_rows(cut)
    with pytest.raises(DataError, match=r"\.jsonl, \.jsonl\.gz"):
        files.read_rows(tmp_path / "x.pkl")


def test_find_takes_every_known_ending(tmp_path: Path) -> None:
    for name in ("finance_b.csv", "finance_a.jsonl.gz", "finance_c.pkl", "code_a.json"):
        (tmp_path / name).touch()
    assert [p.name for p in files.find(tmp_path, "finance_*")] == ["finance_a.jsonl.gz", "finance_b.csv"]
