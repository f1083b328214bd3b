import gzip
import os
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    ("rows", "columns", "said"), [(5_000_001, 1, "5000001 rows, at most 5000000"), (1_000_000, 51, "51000000 values")]
)
def test_a_small_parquet_file_of_very_many_rows_or_values_is_not_read(
    tmp_path: Path, rows: int, columns: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    path, one = tmp_path / "x.parquet", pa.nulls(rows, pa.string())
    pyarrow.parquet.write_table(pa.table({str(i): one for i in range(columns)}), path, row_group_size=rows)
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(files, "_parquet_columns", lambda *_: pytest.fail("it was read"))
    with pytest.raises(CorruptFileError, match=said):
        files.read_rows(path)


def test_lists_and_bytes_that_a_parquet_file_expands_to_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a": [[None] * 40, ["x" * 5000]]}), tmp_path / "x.parquet")
    assert len(files.read_rows(tmp_path / "x.parquet")) == 2
    for bound, most, said in (("MOST_VALUES", 40, "41 values"), ("MAX_FILE_BYTES", 5000, "uncompressed bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(files, bound, most)
            with pytest.raises(CorruptFileError, match=said):
                files.read_rows(tmp_path / "x.parquet")


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    assert files.read_rows(_write(tmp_path / "array.jsonl", '[{"a": 1}]', True)) == [{"a": 1}]


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"x\.jsonl: line 2"):
        files.read_rows(_write(tmp_path / "x.jsonl", '{"a": 1}\n{"a": \n', False))
    with pytest.raises(CorruptFileError, match="row 1 is a number, not an object"):
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
    assert [p.name for p in files.find("finance_*", tmp_path)] == ["finance_a.jsonl.gz", "finance_b.csv"]


def test_csv_rows_with_cells_too_many_or_too_few_stand_as_bad_rows(tmp_path: Path) -> None:
    rows = files.read_rows(_write(tmp_path / "x.csv", 'a,b\n1,2\nrose, fell,3\n\n4\n"5\n5",6\n', False))
    assert [r.reason.removeprefix(str(tmp_path)) for r in rows if isinstance(r, files.BadRow)] == [
        "x.csv: line 3 has 3 cells, the header 2",
        "x.csv: line 5 has 1 cells, the header 2",
    ]
    assert [r for r in rows if r] == [{"a": "1", "b": "2"}, {"a": "5\n5", "b": "6"}]


def test_a_long_csv_text_is_read_whole(tmp_path: Path) -> None:
    assert files.read_rows(_write(tmp_path / "x.csv", f"a,b\n1,{'x' * 200_000}\n", False))[0]["b"] == "x" * 200_000


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("x.csv", b"a;b\n1;2\n", r"separated by ';', a comma is wanted"),
        ("x.csv", b"a\tb\n1\t2\n", r"separated by '\\t', a comma is wanted"),
        ("x.csv", b"a,b,a\n1,2,3\n", r"line 1: several columns are called 'a'"),
        ("x.csv", b'a,b\n1,2\n3,"4\n', r"x\.csv: line 3: unexpected end of data"),
        ("x.jsonl", b'{"a": 1}\r{"a": 2}\r', "its lines end with CR alone"),
        (
            "x.json",
            b'{\n "data": [\n  {"a": 1}\n ]\n}',
            "an object over several lines: an array of rows, or one object",
        ),
        ("x.json", b"[[1]]", "row 1 is a list, not an object"),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), "looks like UTF-16; save it as UTF-8"),
        ("x.csv", "a,b\n1,2\n".encode("utf-16-le"), "looks like UTF-16; save it as UTF-8"),
        ("x.jsonl", b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        ("x.jsonl", b'{"a": "\x00"}', "line 1"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(CorruptFileError, match=said):
        files.read_rows(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    assert files.read_rows(_write(tmp_path / "x.csv", "\ufeffa,b\n1,2\n", False)) == [{"a": "1", "b": "2"}]
    assert files.read_rows(_write(tmp_path / "x.jsonl", '\ufeff{"a": 1}', True)) == [{"a": 1}]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("x.csv", "x.jsonl", "x.json"):
        assert files.read_rows(_write(tmp_path / name, "", False)) == []


def _odd_table() -> Any:
    """A table of which `text` alone can be read whole: the others hold what Python cannot."""
    import pyarrow as pa

    bad = pa.array([b"fine", b"\xff\xfe", None]).cast(pa.binary())
    columns = {
        "text": pa.array(["a", "b", None]),
        "span": pa.array([1, 2**62, None], pa.duration("s")),
        "when": pa.array([0, 1, None], pa.timestamp("s", tz="Mars/Olympus")),
        "raw": pa.Array.from_buffers(pa.string(), 3, bad.buffers()),
    }
    return pa.table([*columns.values(), columns["text"]], names=[*columns, "twin"]).rename_columns(
        ["text", "span", "when", "raw", "raw2"]
    )


def test_parquet_columns_that_python_cannot_hold_spoil_only_their_own_values(tmp_path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(_odd_table(), tmp_path / "x.parquet")
    rows = files.read_rows(tmp_path / "x.parquet")
    assert [r["text"] for r in rows] == ["a", "b", None]
    assert [r["raw"] for r in rows] == ["fine", files.Unreadable("of x.parquet is not UTF-8 at its byte 0"), None]
    assert isinstance(rows[1]["span"], files.Unreadable)
    assert isinstance(rows[0]["when"], files.Unreadable)


def test_two_parquet_columns_of_one_name_are_not_chosen_from(tmp_path: Path) -> None:
    import pyarrow.parquet

    table = _odd_table().select(["text", "raw2"]).rename_columns(["text", "text"]).append_column("b", [["1", "2", "3"]])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    rows = files.read_rows(tmp_path / "x.parquet")
    assert {r["text"] for r in rows} == {files.Unreadable("is the name of 2 columns of x.parquet")}
    assert [r["b"] for r in rows] == ["1", "2", "3"]


def test_two_files_of_one_set_are_refused_and_what_a_folder_has_is_listed(tmp_path: Path) -> None:
    for name in ("FINANCE_A.JSONL", "train.jsonl", "x.tsv"):
        (tmp_path / name).touch()
    assert files.find("finance_*", tmp_path) == []
    assert files.listed(tmp_path) == f"{tmp_path} has FINANCE_A.JSONL, train.jsonl, x.tsv"
    assert "No such file" in files.listed(tmp_path / "no")
    for name in ("finance_a.v1.csv", "finance_a.v2.csv"):
        (tmp_path / name).touch()
    assert len(files.find("finance_*", tmp_path)) == 2
    (tmp_path / "finance_a.v2.jsonl.gz").touch()
    with pytest.raises(DataError, match=r"a\.v2\.csv and .*a\.v2\.jsonl\.gz are two files of one set"):
        files.find("finance_*", tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv.gz", "x.parquet"])
def test_a_device_or_a_fifo_is_no_file_of_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / f"device-{name}").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / f"fifo-{name}")
    for kind in ("device", "fifo"):
        with pytest.raises(CorruptFileError, match=r"is neither a file|is not a file"):
            files.read_rows(tmp_path / f"{kind}-{name}")
