"""What can be wrong with what is handed in, each said in a line; and what may stand around the packed runs."""

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtune.board.validate import check
from fedtune.cli import app
from fedtune.io import file_sha256

pytestmark = pytest.mark.xdist_group("submission")


def reasons(path: Path) -> str:
    return "\n".join(str(p) for _, _, problems in check(path) for p in problems)


def zipped(folder: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + str(path.relative_to(folder)))
    return target


def patched(path: Path, local: int, central: int, value: int) -> Path:
    """Set a byte in every header of an archive, in both places where zip keeps it."""
    raw = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        place = raw.find(mark)
        while place >= 0:
            raw[place + offset] = value
            place = raw.find(mark, place + 4)
    path.write_bytes(bytes(raw))
    return path


@pytest.mark.parametrize("prefix", ["", "submission/", "repository-main/submissions/a-team/"])
def test_a_zip_with_folders_around_the_runs_is_good(good: Path, tmp_path: Path, prefix: str) -> None:
    assert reasons(zipped(good, tmp_path / "s.zip", prefix)) == ""


def test_what_file_managers_leave_behind_is_not_looked_at(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "submission")
    left = (".DS_Store", "Thumbs.db", "seed-1/.DS_Store", "seed-1/adapter/Thumbs.db", "__MACOSX/seed-1/._rounds.jsonl")
    for name in (*left, "seed-2/._rounds.jsonl", "seed-2/evals/._x.jsonl.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0")
    assert reasons(folder) == ""
    assert reasons(zipped(folder, tmp_path / "s.zip", "submission/")) == ""
    # it hides nothing: a file of the run under such a name is a file that is missing
    shutil.move(folder / "seed-1/rounds.jsonl", folder / "seed-1/._rounds.jsonl")
    assert "rounds.jsonl: is listed in entry.json but missing" in reasons(folder)


def test_runs_amid_other_files_are_named(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "repository/submissions/a-team")
    (tmp_path / "repository/setup.py").write_text("")
    assert "setup.py: belongs to no packed run; the packed runs are in submissions/a-team" in reasons(
        tmp_path / "repository"
    )
    shutil.copytree(good / "seed-1", tmp_path / "repository/elsewhere/seed-3")
    assert "has packed runs in several folders: elsewhere, submissions/a-team" in reasons(tmp_path / "repository")


def test_a_pickle_beside_the_runs_is_found_and_a_text_may_stand_there(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "s")
    (tmp_path / "s/README.md").write_text("who we are")
    assert reasons(tmp_path / "s") == ""
    (tmp_path / "s/weights.bin").write_bytes(b"\x80\x04")
    assert "weights.bin: belongs to no packed run" in reasons(tmp_path / "s")


ARCHIVES: list[tuple[str, Callable[[Path], Path], str]] = [
    ("encrypted", lambda z: patched(z, 6, 8, 1), "is encrypted; zip it without a password"),
    ("deflate64", lambda z: patched(z, 8, 10, 9), "is compressed with Deflate64; zip it with ordinary deflate"),
    ("method 99", lambda z: patched(z, 8, 10, 99), "is compressed with method 99"),
]


@pytest.mark.parametrize(("name", "change", "said"), ARCHIVES, ids=[a[0] for a in ARCHIVES])
def test_an_archive_that_python_cannot_unpack_says_why_once(
    good: Path, tmp_path: Path, name: str, change: Callable[[Path], Path], said: str
) -> None:
    found = reasons(change(zipped(good, tmp_path / "s.zip")))
    assert said in found
    assert len(found.splitlines()) == 1


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a\\entry.json"], "is written with backslashes; zip it with a tool that writes /"),
        (["C:/entry.json"], "leads outside the archive"),
        (["entry.json", "entry.json"], "is there twice"),
        (["s/entry.json", "s/Entry.JSON"], "differs from another name in case only"),
        (["s/\u00e9.json", "s/e\u0301.json"], "differs from another name in case only"),
        (["inner.zip"], "is an archive inside the archive"),
        (["s/" + "a/" * 900 + "x.md"], "lies more than 20 folders deep"),
        (["s/x.tar.gz"], "is an archive inside the archive"),
        (["readme.md"], "has no entry.json, nor has a folder in it"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_cannot_be_unpacked_safely_are_refused(tmp_path: Path, names: list[str], said: str) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    assert said in reasons(tmp_path / "s.zip")


def test_links_and_devices_in_an_archive_are_refused(tmp_path: Path) -> None:
    for kind, said in ((0xA, "is a link"), (0x1, "is neither a file nor a folder"), (0x6, "is neither")):
        info = zipfile.ZipInfo("s/entry.json")
        info.external_attr = kind << 28
        with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
            archive.writestr(info, "/etc/passwd")
        assert said in reasons(tmp_path / "s.zip")


def test_an_archive_that_says_it_is_small_unpacks_no_further(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("entry.json", b"0" * 1_000_000)
    raw = (tmp_path / "s.zip").read_bytes()
    (tmp_path / "s.zip").write_bytes(raw.replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    assert "damaged" in reasons(tmp_path / "s.zip")


def test_links_in_place_of_folders_are_refused(good: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/seed-1").symlink_to(good / "seed-1")
    assert "seed-1: is a link; submit the folder itself" in reasons(tmp_path / "s")
    (tmp_path / "whole").symlink_to(good)
    assert "whole: is a link" in reasons(tmp_path / "whole")
    shutil.copytree(good, tmp_path / "t")
    (tmp_path / "t/seed-3").symlink_to("seed-1")
    assert "seed-3: is a link" in reasons(tmp_path / "t")


def test_a_pipe_in_a_submission_is_never_opened(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "s")
    os.mkfifo(tmp_path / "s/seed-1/evals/pipe.json")
    assert "evals/pipe.json: is neither a file nor a folder" in reasons(tmp_path / "s")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["validate", str(tmp_path / "nothing")])
    assert done.exit_code == 4
    assert "no such folder or file" in done.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.replace(b"\n", b"\r\n"), "its line ends were changed to CRLF"),
        (lambda raw: b"\xef\xbb\xbf" + raw, "a byte-order mark was put before it"),
    ],
)
def test_what_version_control_and_editors_do_to_texts_is_told_once(
    good: Path, tmp_path: Path, change: Callable[[bytes], bytes], said: str
) -> None:
    shutil.copytree(good / "seed-1", tmp_path / "seed-1")
    for name in ("data.json", "README.md", "results_lm_eval.json"):
        path = tmp_path / "seed-1" / name
        path.write_bytes(change(path.read_bytes()))
    found = reasons(tmp_path / "seed-1")
    assert found.count(said) == 1
    assert found.startswith("README.md, data.json, results_lm_eval.json: is not the file that was listed")


def test_a_strangers_names_do_nothing_to_a_terminal_or_a_runner(good: Path, tmp_path: Path) -> None:
    """Escape sequences, a line end and a runner's command in names come out spelled out, on one line."""
    shutil.copytree(good / "seed-1", tmp_path / "s/seed-1")
    odd = "x\x1b[31m\n::error::owned\u202e.json"
    (tmp_path / "s/seed-1" / odd).write_text("{}")
    done = CliRunner().invoke(app, ["validate", str(tmp_path / "s")])
    assert done.exit_code == 4
    assert not {"\x1b", "\x07", "\u202e"} & set(done.output)
    assert not [line for line in done.output.splitlines() if line.lstrip().startswith("::")]
    assert "x\\x1b[31m\\n::error::owned\\u202e.json: is present but not listed" in done.output
    entry = json.loads((tmp_path / "s/seed-1/entry.json").read_text())
    entry["files"] = {"\x1b]0;owned\x07": file_sha256(good / "seed-1/README.md"), **entry["files"]}
    (tmp_path / "s/seed-1/entry.json").write_text(json.dumps(entry))
    done = CliRunner().invoke(app, ["validate", str(tmp_path / "s")])
    assert done.exit_code == 4
    assert not {"\x1b", "\x07", "\u202e"} & set(done.output)
    assert "a name in files: has U+001B" in done.output


def test_a_submission_has_the_seeds_of_one_recipe_and_no_more(tmp_path: Path) -> None:
    for number in range(21):
        (tmp_path / f"s/seed-{number}").mkdir(parents=True)
        (tmp_path / f"s/seed-{number}/entry.json").write_text("{}")
    assert "has 21 packed runs, at most 20 seeds of one recipe are taken" in reasons(tmp_path / "s")


def of_names(target: Path, count: int, *, longer: bool) -> Path:
    """Write an archive that is a list of names and nothing else, with a zip64 end where it is `longer`."""
    names = (f"{i:06x}".encode() for i in range(count))
    head = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0)
    listed = b"".join(head + name for name in names)
    size, said = len(listed), 1  # the count that an archive says is not what is read
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, said, said, size, 0, 0)
    if longer:
        end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, said, said, size, 0)
        end += struct.pack("<4sLQL", b"PK\x06\x07", 0, size, 1)
        end += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    target.write_bytes(listed + end)
    return target


@pytest.mark.parametrize("longer", [False, True], ids=["zip", "zip64"])
def test_a_long_list_of_names_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longer: bool) -> None:
    made: list[str] = []
    whole = zipfile.ZipInfo.__init__

    def counted(self: zipfile.ZipInfo, name: str = "NoName", *rest: Any, **named: Any) -> None:
        made.append(name)
        whole(self, name, *rest, **named)

    monkeypatch.setattr(zipfile.ZipInfo, "__init__", counted)
    found = reasons(of_names(tmp_path / "few.zip", 2_001, longer=longer))
    assert "unpacks to more than 2000 files" in found
    assert len(made) >= 2_001
    made.clear()
    found = reasons(of_names(tmp_path / "many.zip", 30_000, longer=longer))
    assert found == "many.zip: its list of names has 1,560,000 bytes, at most 1,024,000 are taken"
    assert made == []
