"""Downloads against a small index on this machine: resumed, restarted, verified, cached."""

import errno
import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.data import packages
from fedtune.types import CorruptFileError, OfflineError

BODY = bytes(range(256)) * 4000
NAME = "thing-1.0-py3-none-any.whl"
GOOD = packages.Package("thing", NAME, hashlib.sha256(BODY).hexdigest(), "MIT")


class Index(http.server.BaseHTTPRequestHandler):
    cut = 0
    ranges = True
    slow = 0.0
    asked: list[str]

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/simple/thing/":
            self._send(200, f'<a href="../../files/{NAME}#sha256=x">{NAME}</a>'.encode())
            return
        start = 0
        wanted = self.headers.get("Range")
        type(self).asked.append(wanted or "all")
        if wanted and type(self).ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        body = BODY[start:]
        if type(self).cut > 0:
            type(self).cut -= 1
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            return
        self._send(206 if start else 200, body)

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(body), 1 << 16):
            time.sleep(type(self).slow)
            self.wfile.write(body[start : start + (1 << 16)])


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Index]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Index.cut, Index.ranges, Index.asked, Index.slow = 0, True, [], 0.0
    monkeypatch.setenv("FEDTUNE_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "time", SimpleNamespace(sleep=lambda seconds: None, time_ns=time.time_ns))
    yield Index
    server.shutdown()


def test_a_package_is_fetched_once_and_then_read_from_the_cache(index: type[Index]) -> None:
    path = packages.fetch(GOOD)
    assert path.read_bytes() == BODY
    assert packages.fetch(GOOD) == path
    assert index.asked == ["all"]


def test_a_file_that_has_settled_is_hashed_once_until_it_changes(
    index: type[Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hashed = packages.fetch(GOOD), list[Path]()
    real = packages.file_sha256
    monkeypatch.setattr(packages, "file_sha256", lambda p: hashed.append(p) or real(p))
    assert [packages.fetch(GOOD) for _ in range(3)] == [path] * 3
    assert len(hashed) == 3, "a file that has just been written may change within one tick of the clock"
    monkeypatch.setattr(packages, "SETTLED_NS", -(10**18))
    assert [packages.fetch(GOOD) for _ in range(3)] == [path] * 3
    assert len(hashed) == 4
    path.write_bytes(BODY[1:])
    assert packages.fetch(GOOD).read_bytes() == BODY


def test_a_cut_download_goes_on_where_it_was_cut(index: type[Index]) -> None:
    index.cut = 2
    assert packages.fetch(GOOD).read_bytes() == BODY
    assert index.asked[0] == "all"
    assert index.asked[1] == f"bytes={len(BODY) // 2}-"
    assert len(index.asked) == 3


def test_a_server_without_ranges_restarts_it(index: type[Index]) -> None:
    index.cut, index.ranges = 1, False
    assert packages.fetch(GOOD).read_bytes() == BODY


def test_a_wrong_file_is_refused_and_not_kept(index: type[Index], tmp_path: Path) -> None:
    bad = packages.Package("thing", NAME, "0" * 64, "MIT")
    with pytest.raises(CorruptFileError, match="pinned is 0000"):
        packages.fetch(bad)
    assert list((tmp_path / "cache/packages").iterdir()) == []


def test_a_damaged_cache_is_fetched_again(index: type[Index]) -> None:
    path = packages.fetch(GOOD)
    path.write_bytes(b"half")
    assert packages.fetch(GOOD).read_bytes() == BODY


def test_no_network_says_where_to_put_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("FEDTUNE_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(packages, "time", SimpleNamespace(sleep=lambda seconds: None, time_ns=time.time_ns))
    with pytest.raises(OfflineError, match=rf"Put the file into {tmp_path}"):
        packages.fetch(GOOD)


def test_the_index_is_the_one_pip_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FEDTUNE_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".config/pip").mkdir(parents=True)
    (tmp_path / ".config/pip/pip.conf").write_text("[global]\nindex-url = https://mirror.example/simple/\n")
    assert packages.index_url() == "https://mirror.example/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.example/simple")
    assert packages.index_url() == "https://other.example/simple"


TAKE = """
import hashlib, sys
from fedtune.data import packages
path = packages.fetch(packages.Package("thing", sys.argv[1], sys.argv[2], "MIT"))
print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_processes_that_start_together_on_a_cold_cache_fetch_once(index: type[Index]) -> None:
    index.slow = 0.05
    words = [sys.executable, "-c", TAKE, NAME, GOOD.sha256]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == [GOOD.sha256] * 3
    assert index.asked == ["all"]


def test_what_a_killed_process_left_is_gone_on_with_or_thrown_away(index: type[Index], tmp_path: Path) -> None:
    partial = tmp_path / f"cache/packages/{NAME}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(BODY[:1000])
    assert packages.fetch(GOOD).read_bytes() == BODY
    packages.fetch(GOOD).unlink()
    partial.write_bytes(b"x" * 1000)
    assert packages.fetch(GOOD).read_bytes() == BODY
    assert index.asked == ["bytes=1000-", "bytes=1000-", "all"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_not_called_the_network(
    index: type[Index], monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(packages, "open", lambda path, mode: Full(path, mode), raising=False)
    with pytest.raises(OSError, match=os.strerror(error)) as caught:
        packages.fetch(GOOD)
    assert not isinstance(caught.value, OfflineError)
    assert caught.value.filename.endswith(f"{NAME}.partial")
    assert index.asked == ["all"]


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:9/simple", "ftp://127.0.0.1:9/x"])
def test_an_index_that_cannot_be_asked_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("FEDTUNE_INDEX_URL", url)
    monkeypatch.setattr(packages, "time", SimpleNamespace(sleep=lambda seconds: None, time_ns=time.time_ns))
    with pytest.raises(OfflineError, match=f"cannot fetch {NAME} from {url}"):
        packages.fetch(GOOD)
