"""What clients keep on disk: whole after every round, and what all have alike is there once."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune.federation import blocks
from fedtune.federation.private import PrivateStore
from fedtune.lora.state import PREFIX
from fedtune.types import CorruptFileError

A, B = PREFIX + "l.q.base_A.weight", PREFIX + "l.q.base_B.weight"
WIDE = PREFIX + "l.v.base_B.weight"
ROUND = 48  # columns a round


def base(round_: int) -> dict[str, Tensor]:
    """Return the side adapters after a round: every round adds columns."""
    generator = torch.Generator().manual_seed(0)
    whole, count = torch.randn(40 * ROUND, 30, generator=generator), round_ * ROUND
    return {A: whole[:count], B: whole[:count].T * 2, WIDE: whole[: count // 3].T}


def kept(client: int, round_: int) -> dict[str, Tensor]:
    return {**base(round_), "own": torch.full((3,), float(client)), "base/held": torch.tensor([[round_, 1]])}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def on_disk(folder: Path) -> int:
    """Return the bytes of all files, each inode once."""
    return sum({f.stat().st_ino: f.stat().st_size for f in folder.rglob("*") if f.is_file()}.values())


def played(folder: Path, clients: int, rounds: int) -> PrivateStore:
    """Let clients take part every third round, each in its own."""
    store = PrivateStore(folder)
    for round_ in range(1, rounds + 1):
        for client in range(clients):
            if (client + round_) % 3 == 0:
                store.save(client, (round_, 1), kept(client, round_))
    return store


def test_side_adapters_are_on_disk_once_whoever_has_them(tmp_path: Path) -> None:
    played(tmp_path / "one", 3, 12)
    played(tmp_path / "many", 30, 12)
    whole = sum(t.numel() * 4 for t in base(12).values())
    # each further client costs its own few numbers; rounds end inside a block, which is then there for each of them
    assert on_disk(tmp_path / "many") < on_disk(tmp_path / "one") + 27 * 4 * 600
    assert on_disk(tmp_path / "one") < 3 * whole
    for client in range(30):
        last = max(r for r in range(1, 13) if (client + r) % 3 == 0)
        assert same(PrivateStore(tmp_path / "many").load(client, (13, 1)), kept(client, last))


def test_blocks_that_nobody_holds_are_deleted(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path, rounds=1)
    for round_ in range(1, 30):
        fresh = {n: t + round_ for n, t in kept(0, 3).items()}  # a compressed base has other numbers each time
        store.save(0, (round_, 1), fresh)
        assert same(store.load(0, (round_ + 1, 1)), fresh)
    assert len(list((tmp_path / "shared").iterdir())) == len(list((tmp_path / "client-000000").glob("*.base-*")))
    assert on_disk(tmp_path) < 5 * sum(t.numel() * 4 for t in base(3).values())


def test_a_run_that_steps_back_finds_what_the_client_had(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path)
    for round_ in (1, 2, 3, 4):
        store.save(0, (round_, 1), kept(0, round_))
    assert same(store.load(0, (3, 1)), kept(0, 2))
    store.save(0, (3, 1), kept(7, 3))
    assert same(store.load(0, (9, 1)), kept(7, 3))


def test_without_hard_links_there_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuses)
    store = played(tmp_path, 3, 5)
    assert same(store.load(0, (9, 1)), kept(0, 3))


def test_a_block_that_another_process_deletes_at_the_last_moment_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, gone = os.link, []

    def late(block: Path, link: Path) -> None:
        if not gone:
            gone.append(block)
            block.unlink()
        plain(block, link)

    monkeypatch.setattr(os, "link", late)
    store = PrivateStore(tmp_path)
    store.save(0, (1, 1), kept(0, 1))
    assert gone
    assert same(store.load(0, (2, 1)), kept(0, 1))


def test_a_missing_block_is_told_with_its_place(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path)
    store.save(0, (1, 1), kept(0, 3))
    next((tmp_path / "client-000000").glob("*.base-0001")).unlink()
    with pytest.raises(CorruptFileError, match=r"block 2 of 3 of its side adapters is missing"):
        store.load(0, (2, 1))


def test_what_has_no_side_adapters_is_as_it_was(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path)
    store.save(0, (1, 1), {"own": torch.ones(2)})
    assert same(store.load(0, (2, 1)), {"own": torch.ones(2)})
    assert not (tmp_path / "shared").exists()
    assert blocks.axis_of("own") is None


def test_tensors_that_share_memory_are_kept_like_any_other(tmp_path: Path) -> None:
    """SCAFFOLD keeps a control twice in a round that did not train it, and a safetensors file takes no memory twice."""
    store, one = PrivateStore(tmp_path), torch.arange(6.0).reshape(2, 3)
    kept = {"a": one, "b": one, "c": one.T, "d": one[1:]}
    store.save(0, (1, 1), kept)
    found = store.load(0, (2, 1))
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[n], t) for n, t in kept.items())
