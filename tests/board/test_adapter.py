"""An adapter's own settings and its layers' names are those of the run, whatever of them a submitter changed."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from fedtune import spaces
from fedtune.board import adapter
from fedtune.board.adapter import ADAPTER, CONFIG, adapter_problems
from fedtune.board.entries import from_run
from fedtune.methods import METHODS
from fedtune.methods.traits import moves_base
from fedtune.results.entry import Entry
from fedtune.spaces import saved as on_file
from fedtune.tensors import tensor_header

pytestmark = pytest.mark.xdist_group("submission")
KNOWN = "HuggingFaceTB/SmolLM2-135M-Instruct"
GROWING = sorted(name for name, kind in METHODS.items() if moves_base(kind))


@pytest.fixture
def packed(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good / "seed-1", tmp_path / "seed-1")
    return tmp_path / "seed-1"


def said(packed: Path, entry: Entry) -> str:
    return "\n".join(str(p) for p in adapter_problems(packed, entry) if "trainable_parameters" not in str(p))


def configured(packed: Path, **changed: Any) -> None:
    path = packed / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def written(packed: Path, layers: dict[str, tuple[int, int]], rank: int = 4) -> None:
    """Write an adapter of zeros with these layers, (in, out) by path."""
    header, end = {}, 0
    for path, (into, out) in layers.items():
        for name, shape in (("lora_A", [rank, into]), ("lora_B", [out, rank])):
            size = 2 * shape[0] * shape[1]
            place = [end, end + size]
            header[f"base_model.model.{path}.{name}.weight"] = {"dtype": "F16", "shape": shape, "data_offsets": place}
            end += size
    text = json.dumps(header).encode()
    (packed / ADAPTER).write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"layers_to_transform": 0}, "layers_to_transform is set; a run sets none"),
        ({"layers_to_transform": 1}, "layers_to_transform is set; a run sets none"),
        ({"exclude_modules": "q_proj"}, "exclude_modules is set; a run sets none"),
        ({"target_modules": "nothing"}, "target_modules is no list of names"),
        ({"target_modules": "all-linear"}, "target_modules is no list of names"),
        ({"target_modules": None}, "target_modules is no list of names"),
        ({"target_modules": []}, "target_modules and the layers in the file are not the same"),
        ({"target_modules": ["q_proj"]}, "target_modules and the layers in the file are not the same"),
        ({"use_rslora": True}, "use_rslora is True, the settings say False"),
        ({"lora_dropout": 0.5}, "lora_dropout is 0.5, the settings say 0"),
        ({"revision": "another"}, "was made for revision 'another'"),
    ],
    ids=str,
)
def test_settings_of_another_scale_or_of_other_layers_are_refused(
    packed: Path, changed: dict[str, Any], why: str
) -> None:
    assert said(packed, from_run(packed)) == ""
    configured(packed, **changed)
    assert why in said(packed, from_run(packed))


@pytest.mark.parametrize("method", GROWING)
def test_alpha_and_the_kind_of_scale_belong_together_where_the_base_model_is_moved(packed: Path, method: str) -> None:
    entry = from_run(packed).model_copy(update={"method": method})
    lora = entry.settings.lora
    layers = adapter.saved(packed, from_run(packed))
    for rank, alpha, rslora, fits in (
        (lora.r, lora.alpha, lora.rslora, True),
        (lora.r, float(lora.r), False, True),
        (lora.r, lora.alpha, not lora.rslora, False),
        (lora.r, float(lora.r), True, False),
        (12, 12.0, False, True),
        (12, 12.0, True, False),
        (12, lora.alpha, lora.rslora, False),
        (12, lora.alpha, True, False),
    ):
        written(packed, {path: (i, o) for path, (i, o, _) in layers.items()}, rank)
        configured(packed, r=rank, lora_alpha=alpha, use_rslora=rslora)
        assert (said(packed, entry) == "") == fits, (rank, alpha, rslora, said(packed, entry))


def of_the_zoo(packed: Path, **lora: Any) -> Entry:
    entry = from_run(packed)
    configured(packed, base_model_name_or_path=KNOWN)
    return entry.model_copy(
        update={"base": KNOWN, "config": {**entry.config, "lora": {**entry.config["lora"], **lora}}}
    )


@pytest.mark.parametrize(
    "spelled",
    [
        "text_model.encoder.layers.{i}.self_attn.{name}",
        "model.layers.{i}.mlp.{name}",
        "model.layers.0{i}.self_attn.{name}",
        "model.layers.{i}.self_attn.experts.{name}",
        "layers.{i}.self_attn.{name}",
        "layers.{i}.layers.{i}.{name}",
    ],
)
def test_layers_that_the_base_model_has_under_another_path_are_refused(packed: Path, spelled: str) -> None:
    entry = of_the_zoo(packed)
    wanted = spaces.of(entry.settings).on_base(entry) or {}
    written(packed, wanted)
    assert said(packed, entry) == ""
    names = {path: path.split(".") for path in wanted}
    written(packed, {spelled.format(i=names[p][2], name=names[p][4]): shape for p, shape in wanted.items()})
    assert "its 60 layers are not the 60 that the settings adapt" in said(packed, entry)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["all-linear"], 210), (["self_attn.q_proj", "mlp.down_proj"], 60), (["layers.3.self_attn.k_proj"], 1)],
)
def test_targets_of_any_spelling_are_held_against_the_zoo(packed: Path, targets: list[str], count: int) -> None:
    entry = of_the_zoo(packed, target_modules=targets)
    wanted = spaces.of(entry.settings).on_base(entry) or {}
    assert len(wanted) == count
    written(packed, wanted)
    configured(packed, target_modules=sorted({path.split(".", 3)[-1] for path in wanted} if count > 1 else targets))
    assert said(packed, entry) == ""
    written(packed, {path.replace("model.layers", "evil.layers"): shape for path, shape in wanted.items()})
    assert f"its {count} layers are not the {count} that the settings adapt" in said(packed, entry)


def test_a_layer_that_the_settings_name_is_there(packed: Path) -> None:
    layers = {
        path: (i, o) for path, (i, o, _) in adapter.saved(packed, from_run(packed)).items() if path.endswith("q_proj")
    }
    written(packed, layers)
    configured(packed, target_modules=["q_proj"])
    assert "has no layer v_proj, which lora.target_modules names" in said(packed, from_run(packed))


@pytest.mark.parametrize("name", ["layers.1." * 50_000 + "!", "a" * 2_000, "layers." * 60 + "q_proj"], ids=len)
def test_a_name_longer_than_any_layers_is_refused_before_it_is_looked_into(packed: Path, name: str) -> None:
    written(packed, {name: (1, 1)}, rank=1)
    assert "is no layer's name" in said(packed, from_run(packed))


def test_more_layers_than_any_model_has_are_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_file, "MAX_LAYERS", len(tensor_header(packed / ADAPTER)) // 3 - 1)
    assert "tensors, at most" in said(packed, from_run(packed))


def test_each_layer_is_looked_up_among_the_targets_once(packed: Path) -> None:
    """A text that counts its comparisons: as many targets as layers take no more of them than there are of both."""
    asked = 0

    class Name(str):
        __slots__ = ()

        def __hash__(self) -> int:
            return hash(str(self))

        def __eq__(self, other: object) -> bool:
            nonlocal asked
            asked += 1
            return str(self) == other

    targets = {Name(f"m{i}") for i in range(1_000)}
    asked = 0
    assert len(on_file.unlike(targets, {f"model.layers.{i}.q": (1, 1) for i in range(1_000)})) == 2_000
    assert asked < 20_000


def test_a_model_folder_is_no_part_of_a_submission(packed: Path) -> None:
    entry = from_run(packed)
    other = entry.model_copy(update={"config": {**entry.config, "peft": {"kind": "full"}}})
    wanted = (
        'config.toml: peft.kind = "full"; a model folder is no part of a submission, so its runs cannot be submitted'
    )
    assert said(packed, other) == wanted
    ia3 = entry.model_copy(update={"config": {**entry.config, "peft": {"kind": "ia3"}}})
    assert "lora_A.weight is no vector of an adapter" in said(packed, ia3)
