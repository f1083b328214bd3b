from typing import Any

import pytest

from fedtune.data import hub
from fedtune.types import DataError, OfflineError

SOURCE = hub.HubSet("org/set", "train", revision="abc")


def _fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    import datasets

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def _http(kind: str) -> Exception:
    """Make one of huggingface_hub's errors, which want an HTTP response."""
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(404, request=httpx.Request("GET", "https://example.invalid/x"))
    made: Exception = getattr(errors, kind)("from the hub", response=response)
    return made


@pytest.mark.parametrize(
    ("kind", "expected", "said"),
    [
        ("GatedRepoError", DataError, "accept its terms"),
        ("RevisionNotFoundError", DataError, "that revision is gone"),
        ("RepositoryNotFoundError", DataError, "does not exist, was moved, or is private"),
    ],
)
def test_each_hub_failure_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, kind: str, expected: type[Exception], said: str
) -> None:
    _fail(monkeypatch, _http(kind))
    with pytest.raises(expected, match=said):
        hub.load(SOURCE)


def test_a_wrapped_gated_error_is_still_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError("could not load")
    error.__cause__ = _http("GatedRepoError")
    _fail(monkeypatch, error)
    with pytest.raises(DataError, match="hf auth login"):
        hub.load(SOURCE)


def test_no_network_names_the_offline_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail(monkeypatch, ConnectionError("Name or service not known"))
    with pytest.raises(OfflineError, match="copy HF_HOME, or use --data FOLDER"):
        hub.load(SOURCE)


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _fail(monkeypatch, OfflineModeIsEnabled("offline"))
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE is set"):
        hub.load(SOURCE)


def test_rows_come_back_as_dicts_and_the_revision_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(name: str, config: str | None, **kwargs: Any) -> Any:
        asked.update(name=name, config=config, **kwargs)
        return datasets.Dataset.from_list([{"a": 1}, {"a": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert hub.load(SOURCE) == [{"a": 1}, {"a": 2}]
    assert asked == {"name": "org/set", "config": None, "split": "train", "revision": "abc"}
