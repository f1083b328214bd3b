"""What went wrong while something was fetched or read, and the remedy for just that."""

import errno
import os
from pathlib import Path

import pytest

from fedtune.data.hub import explain, guarded
from fedtune.types import FedtuneError, ModelError, OfflineError


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ModelError, "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), ModelError, "/cache; it must be readable"),
        (OSError(errno.EROFS, "Read-only file system", "/cache"), ModelError, "can be written"),
        (OSError("./m does not appear to have a file named tokenizer.json"), ModelError, "tokenizer.json"),
        (FileNotFoundError("No such file or directory: model-3.safetensors"), ModelError, "model-3.safetensors"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), OfflineError, "cannot be reached"),
        (TimeoutError("timed out"), OfflineError, "cannot be reached"),
        (ValueError("two\n\nlines"), ModelError, "ValueError: two lines"),
    ],
)
def test_each_cause_has_its_own_remedy(error: Exception, kind: type[FedtuneError], said: str) -> None:
    found = explain(error, "base model ./m", ModelError)
    assert type(found) is kind
    assert said in str(found)
    assert "\n" not in str(found)
    assert (kind is OfflineError) == ("the Hub" in str(found))


def test_a_cause_further_down_counts(tmp_path: Path) -> None:
    def call() -> None:
        try:
            (tmp_path / "file").write_text("")
            os.listdir(tmp_path / "file")
        except OSError as err:
            raise RuntimeError("could not load") from err

    with pytest.raises(ModelError, match=r"Not a directory: .*file"):
        guarded(call, "base model x/y", ModelError)
