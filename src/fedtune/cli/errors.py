"""How a command ends that went wrong: one message with what would repair it, and no traceback unasked."""

from __future__ import annotations

import codecs
import errno
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from typer.core import TyperArgument, TyperGroup

from fedtune.machine import cache_dir
from fedtune.types import CancelledError, CorruptFileError, DataError, FedtuneError, RunFailedError, plain

TRACEBACK = "FEDTUNE_TRACEBACK"

# what a terminal without UTF-8 is shown instead
_PLAIN = {"–": "-", "—": "-", "…": "...", "±": "+/-", "×": "x", "·": "-", "“": '"', "”": '"', "‘": "'", "’": "'"}

_REMEDIES = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota, or choose a folder on another disk",
    errno.EACCES: "choose a folder that you may read and write",
    errno.EPERM: "choose a folder that you may read and write",
    errno.EROFS: "choose a folder that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EEXIST: "there is a file where a folder is needed: choose another name, or move the file",
    errno.ENOTDIR: "there is a file where a folder is needed: choose another name, or move the file",
    errno.EISDIR: "there is a folder where a file is needed: name the file",
    errno.ENOENT: "check the name",
    errno.ELOOP: "its links lead in a circle",
    errno.EMFILE: "too many files are open in this process: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
}


class Group(TyperGroup):
    """The commands. EOFError means a truncated file here; click would report Ctrl-D."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # the library would end without a word
            interrupted()
        except EOFError as err:
            raise CorruptFileError(
                f"a file ends too early ({str(err) or 'nothing more to read'}); is it cut off?"
            ) from err

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command with the help of its arguments, which typer before 0.21 loses beside click from 8.5 on."""
        found: Any = super().get_command(ctx, cmd_name)
        for argument in (p for p in getattr(found, "params", ()) if isinstance(p, TyperArgument)):
            (given,) = get_type_hints(found.callback, include_extras=True)[argument.name].__metadata__
            argument.help = given.help
        return found


def _file_error(err: OSError) -> str:
    """Return an error of the file system with its place and its remedy."""
    path = err.filename2 or err.filename
    what = f"{os.fsdecode(path)}: " if isinstance(path, (str, bytes)) else ""
    fix = _REMEDIES.get(err.errno or 0, "")
    if path and Path(os.fsdecode(path)).is_relative_to(cache_dir()):
        fix = (f"{fix}; " if fix else "") + "downloads and converted models lie in FEDTUNE_CACHE"
    return f"{what}{err.strerror or err}" + (f"; {fix}" if fix else "")


def _unexpected(err: Exception) -> str:
    """Return what should not have happened, with the place in our own code where it came to light."""
    own = [f for f in traceback.extract_tb(err.__traceback__) if f"{os.sep}fedtune{os.sep}" in f.filename]
    where = f" ({own[-1].filename.rpartition(f'fedtune{os.sep}')[2]}:{own[-1].lineno})" if own else ""
    text = " ".join(str(err).split()) or "no message"
    return (
        f"unexpected {type(err).__name__}: {text}{where}. This is a fault of fedtune: please report it, with what "
        f"{TRACEBACK}=1 shows"
    )


def said(err: BaseException) -> tuple[str, int]:
    """Return the message of an error that ends a command, and the exit code."""
    if isinstance(err, (FedtuneError, CancelledError)):
        return f"{type(err).__name__}: {err}", err.exit_code
    if isinstance(err, OSError):
        return f"{type(err).__name__}: {_file_error(err)}", 1
    if isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError":
        first = str(err).split(". ")[0] or "no memory left"
        return f"out of memory: {first}; smaller passes need less: -s engine.max_tokens_per_forward=1024", 1
    return (_unexpected(err), 1) if isinstance(err, Exception) else (f"{type(err).__name__}: {err}", 1)


def end(err: BaseException) -> None:
    """Print how a command ended and exit; with the traceback where `FEDTUNE_TRACEBACK` asks for it."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        traceback.print_exception(err)
    text, code = said(err)
    print(plain(text, 100_000), file=sys.stderr)
    sys.exit(code)


def check_withheld(reasons: Mapping[str, str], asked: int) -> None:
    """Say why scores are withheld of those `asked`, by the name of each; what there is stays written.

    Raises:
        RunFailedError: all are withheld. DataError: some are.
    """
    if not reasons:
        return
    listed = "".join(f"\n  {name}: {why}" for name, why in reasons.items())
    if len(reasons) == asked:
        raise RunFailedError(f"score withheld:{listed}" if asked == 1 else f"all {asked} scores withheld:{listed}")
    raise DataError(f"score withheld ({len(reasons)} of {asked} scores):{listed}")


def interrupted() -> NoReturn:
    """Say that Ctrl-C ended a command that keeps nothing to go on from, and exit."""
    print("cancelled by Ctrl-C", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def _shown(err: UnicodeError) -> tuple[str, int]:
    """Return what stands for characters that the output's encoding does not have."""
    if not isinstance(err, UnicodeEncodeError):
        raise err
    wrong = err.object[err.start : err.end]
    return "".join(
        _PLAIN.get(c, f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}") for c in wrong
    ), err.end


def encodable() -> None:
    """Let no character that the terminal cannot show end a command."""
    codecs.register_error("fedtune.plain", _shown)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="fedtune.plain")
