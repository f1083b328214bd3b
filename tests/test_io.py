import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune import io
from fedtune.io import only_files
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


@pytest.mark.parametrize(("depth", "taken"), [(io.DEEPEST, True), (io.DEEPEST + 1, False), (900, False)])
def test_json_is_nested_no_deeper_than_whoever_goes_through_it_can(tmp_path: Path, depth: int, taken: bool) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": "' + 2000 * "[" + '"}\n' + "[" * depth + "]" * depth + "\n")
    if not taken:
        with pytest.raises(CorruptFileError, match=rf"deep.jsonl: line 2: is nested deeper than {io.DEEPEST} levels"):
            io.read_lines(path)
        return
    io.update_lines(path, io.read_lines(path))
    assert len(io.read_lines(path)) == 2


def test_corrupt_json_names_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(CorruptFileError, match=r"x\.json: line 2, column 7"):
        io.read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CorruptFileError, match="byte 7 is not UTF-8"):
        io.read_json(path)
    with pytest.raises(CorruptFileError, match="no such file"):
        io.read_json(tmp_path / "absent.json")


def test_a_name_that_stands_twice_in_an_object_is_not_chosen_from(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1, "b": {"a": 1}}\n{"a": 1, "b": 2, "a": 3}\n')
    with pytest.raises(CorruptFileError, match=r"x\.jsonl: line 2: 'a' stands twice in one object"):
        io.read_lines(path)


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


def _link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def _fifo(path: Path, target: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("put", [_link, _fifo])
def test_what_is_written_in_place_is_a_file_that_lies_there(tmp_path: Path, put: Callable[[Path, Path], None]) -> None:
    mine = tmp_path / "thesis.txt"
    mine.write_text("years of work")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("lock", "rounds.jsonl"):
        put(folder / name, mine)
    with pytest.raises(CorruptFileError, match=r"lock: is (a link|neither)"), io.folder_lock(folder):
        pass
    with pytest.raises(CorruptFileError, match=r"rounds\.jsonl: is (a link|neither)"):
        io.append_lines(folder / "rounds.jsonl", [{"round": 1}])
    assert mine.read_text() == "years of work"


@pytest.mark.parametrize("name", ["deep/down/x.json", ".hidden", "deep/down"])
def test_a_folder_with_a_link_anywhere_is_refused_and_one_behind_a_link_is_not(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/file.json").write_text("{}")
    (tmp_path / "behind").symlink_to(folder)
    io.only_files(tmp_path / "behind")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path)
    for way in (folder, tmp_path / "behind"):
        with pytest.raises(CorruptFileError, match=f"{name}: is a link"):
            io.only_files(way)


def test_a_fifo_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("fifo.json", "zero.json"):
        for read in (io.read_json, io.read_lines, io.read_text):
            with pytest.raises(CorruptFileError, match=f"{name}: is neither a file nor a folder"):
                read(tmp_path / name)


def test_a_pipe_that_a_shell_gives_is_read(tmp_path: Path) -> None:
    read = "import fedtune.io as io, pathlib; print(io.read_text(pathlib.Path('/dev/stdin'), 9))"
    done = subprocess.run([sys.executable, "-c", read], input="settings", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "settings"
    long = subprocess.run([sys.executable, "-c", read], input="x" * 99, capture_output=True, text=True, check=False)
    assert "more than the 9 this file may have" in long.stderr


def test_folders_inside_each_other_without_end_are_refused_before_they_are_walked(tmp_path: Path) -> None:
    (tmp_path / "/".join("a" * 20)).mkdir(parents=True)
    only_files(tmp_path)
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):  # deeper than Python may recurse
        with contextlib.suppress(FileExistsError):
            os.mkdir("a", dir_fd=place)
        inner = os.open("a", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    try:
        with pytest.raises(CorruptFileError, match="lies more than 20 folders deep"):
            only_files(tmp_path)
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)
