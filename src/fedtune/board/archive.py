"""From what somebody hands in (a folder, or a zip of one) to the packed runs in it.

An archive is checked before it is unpacked.
"""

from __future__ import annotations

import contextlib
import io
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from fedtune.io import DEEPEST_FOLDER, only_shallow
from fedtune.types import Problem

MAX_FILES, MAX_FILE, MAX_TOTAL = 2_000, 512 * 1024**2, 1024**3
MAX_NAMES = MAX_FILES * 512  # bytes of an archive's list of names, each of which is made into an object when it is read
MAX_RUNS = 20  # of one submission: the seeds of a recipe
MAX_TEXT = 16 * 1024**2  # of a file that is parsed whole: what it makes takes some thirty times the room
# of an entry and a result: some thirty thousand clients, and twenty of them are held at a time
MAX_ENTRY = 2 * 1024**2
ENTRY = "entry.json"
INSIDE = (".zip", ".tar", ".tgz", ".7z", ".rar", ".tar.gz")
METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ"}
LINK, FOLDER, FILE = 0xA, 0x4, 0x8
PACK = "pack a run: fedtune submit RUN --out DIR"

CLUTTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave behind, as they do in __MACOSX


def is_clutter(name: str | PurePosixPath | Path) -> bool:
    """Tell whether a path is what a file manager left behind: it is no part of a submission, and never looked at."""
    path = PurePosixPath(name)
    return path.name in CLUTTER or path.name.startswith("._") or "__MACOSX" in path.parts


def inside(folder: Path, part: str = "") -> list[Path]:
    """Return what lies in a submission's folder, or in a part of it, in order: all but folders and clutter."""
    return [p for p in sorted((folder / part).rglob("*")) if not (p.is_dir() or is_clutter(p.relative_to(folder)))]


def _info_problem(info: zipfile.ZipInfo) -> tuple[str, str]:
    """Say what is wrong with one name of an archive, and what would repair it; empty texts where nothing is."""
    name, path, kind = info.filename, PurePosixPath(info.filename), info.external_attr >> 28
    if "\\" in name:
        return "is written with backslashes", "zip it with a tool that writes / between folders"
    if path.is_absolute() or ".." in path.parts or name[1:2] == ":":
        return "leads outside the archive", ""
    if kind == LINK:
        return "is a link", "submit the file itself"
    if kind not in (0, FOLDER, FILE):
        return "is neither a file nor a folder", ""
    if name.count("/") > DEEPEST_FOLDER:
        return f"lies more than {DEEPEST_FOLDER} folders deep", "zip the submission's folder itself"
    if info.flag_bits & 1:
        return "is encrypted", "zip it without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = METHODS.get(info.compress_type, f"method {info.compress_type}")
        return f"is compressed with {method}", "zip it with ordinary deflate"
    if name.lower().endswith(INSIDE):
        return "is an archive inside the archive", "zip the submission's folder itself"
    return "", ""


def _same_names(names: list[str]) -> Iterator[Problem]:
    """Yield names that would be one file on some disks: the same twice, or but for case or accents' spelling."""
    folded = Counter(unicodedata.normalize("NFC", name).casefold().rstrip("/") for name in names)
    for name in dict.fromkeys(names):
        if folded[unicodedata.normalize("NFC", name).casefold().rstrip("/")] > 1:
            yield Problem(name, "is there twice, or differs from another name in case only")


class _ListError(Exception):
    """An archive has a list of names that is too long to be read."""


class _Archive(io.BufferedReader):
    """An archive's bytes. Its list of names is read at once, and nothing else as long: files are unpacked in pieces."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, or refuse to."""
        if size is not None and size > MAX_NAMES:
            raise _ListError(f"its list of names has {size:,} bytes, at most {MAX_NAMES:,} are taken")
        return super().read(size)


def _look(archive: zipfile.ZipFile, name: str) -> Iterator[Problem]:
    """Yield why an archive is not unpacked."""
    infos = archive.infolist()
    if len(infos) > MAX_FILES or sum(i.file_size for i in infos) > MAX_TOTAL:
        yield Problem(name, f"unpacks to more than {MAX_FILES} files or {MAX_TOTAL:,} bytes")
        return
    told: set[tuple[str, str]] = set()
    infos = [i for i in infos if not is_clutter(i.filename)]
    for info in infos:
        what, fix = _info_problem(info)
        # what is wrong with the whole archive is said once
        if what and (what, fix) not in told:
            told |= {(what, fix)} if fix else set()
            yield Problem(info.filename, what, fix)
    yield from _same_names([i.filename for i in infos])


def _unzip(path: Path, folder: Path) -> list[Problem]:
    """Unpack an archive into an empty folder, or return why not."""
    if path.stat().st_size > MAX_TOTAL:
        return [Problem(path.name, f"{path.stat().st_size:,} bytes, at most {MAX_TOTAL:,} are taken")]
    try:
        with _Archive(io.FileIO(path)) as raw, zipfile.ZipFile(raw) as archive:
            problems = list(_look(archive, path.name))
            if not problems:
                archive.extractall(folder, [i for i in archive.infolist() if not is_clutter(i.filename)])
    except _ListError as err:
        return [Problem(path.name, str(err))]
    except zipfile.BadZipFile as err:
        what = f"is not a zip archive, or a damaged one: {err}"
        return [Problem(path.name, what, "hand in a folder, or a zip of one")]
    # whatever a damaged archive makes zipfile and zlib raise: it is not unpacked, and that is all there is to say
    except Exception as err:
        return [Problem(path.name, f"is damaged: {type(err).__name__}: {err}", "zip the submission's folder again")]
    return problems


def packed_runs(root: Path) -> tuple[list[Path], list[Problem]]:
    """Find the packed runs under a folder: itself, its folders, or those of the one folder that holds them.

    Returns:
        The runs, and what keeps them from being taken: none there, links, or files that belong to no run.
    """
    if (root / ENTRY).is_file():
        return [root], []
    links = [p for p in sorted(root.iterdir()) if p.is_symlink()]
    if links:
        return [], [Problem(str(p.relative_to(root)), "is a link", "submit the folder itself") for p in links]
    only_shallow(root)
    there = [p for p in sorted(root.rglob("*")) if not is_clutter(p.relative_to(root))]
    found = sorted({p.parent for p in there if p.name == ENTRY and p.is_file() and not p.is_symlink()})
    if not found:
        return [], [Problem(root.name, f"has no {ENTRY}, nor has a folder in it", PACK)]
    if len({run.parent for run in found}) > 1:
        places = ", ".join(sorted({str(run.parent.relative_to(root)) for run in found})[:5])
        return [], [Problem(root.name, f"has packed runs in several folders: {places}", "hand in one of them")]
    if len(found) > MAX_RUNS:
        many = f"has {len(found)} packed runs, at most {MAX_RUNS} seeds of one recipe are taken"
        return [], [Problem(root.name, many)]
    strays = [p for p in there if _stray(p, found)]
    held = str(found[0].parent.relative_to(root))
    where = "" if held == "." else f"; the packed runs are in {held}, hand in that folder"
    return found, [Problem(str(p.relative_to(root)), f"belongs to no packed run{where}") for p in strays[:5]]


def _stray(path: Path, runs: list[Path]) -> bool:
    """Tell whether a path stands outside of all runs; a text about the submission may stand beside them."""
    if path.is_dir() and not path.is_symlink():
        return False
    return path.suffix != ".md" and not any(run in path.parents for run in runs)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[list[Path], list[Problem]]]:
    """Give the packed runs of a submission, or the problems that keep them from being read, while it is open."""
    if path.is_symlink():
        yield [], [Problem(path.name, "is a link", "hand in the folder itself")]
    elif path.is_dir():
        yield packed_runs(path)
    elif path.is_file():
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / (path.stem or "submission")
            folder.mkdir()
            problems = _unzip(path, folder)
            yield ([], problems) if problems else packed_runs(folder)
    else:
        what = "is neither a folder nor a file" if path.exists() else "no such folder or file"
        yield [], [Problem(str(path), what, PACK)]
