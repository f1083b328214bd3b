"""A run of IA3 is packed and checked as one of LoRA is, and forged ones are refused; a model folder is not packed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from fedtune import spaces
from fedtune.board import build
from fedtune.board.adapter import ADAPTER, CONFIG, adapter_problems
from fedtune.board.entries import from_run
from fedtune.board.submit import pack
from fedtune.board.traffic import byte_problems
from fedtune.board.validate import check
from fedtune.config import Settings
from fedtune.experiment.run import run
from fedtune.results.entry import Entry
from fedtune.spaces.ia3 import USUAL
from fedtune.types import DataError

KNOWN = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _run(settings: Callable[..., Settings], folder: Path, kind: str) -> Path:
    from fedtune.settings import load

    plain = settings(seed=1, federation={"clients": 2, "rounds": 1}, eval={"limit": 0, "base": True}).config.plain()
    plain.pop("lora")
    return run(load([{**plain, "peft": {"kind": kind}}]), folder)[0]


@pytest.fixture(scope="module")
def ia3(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ia3")
    pack([_run(settings, root / "run", "ia3")], root / "packed", "a team", "a title")
    return root / "packed"


@pytest.fixture
def packed(ia3: Path, tmp_path: Path) -> Path:
    shutil.copytree(ia3 / "seed-1", tmp_path / "seed-1")
    return tmp_path / "seed-1"


def said(packed: Path, entry: Entry) -> str:
    return "\n".join(map(str, [*adapter_problems(packed, entry), *byte_problems(packed, entry)]))


def test_a_run_of_ia3_is_valid_and_unranked(ia3: Path) -> None:
    [(_, entry, problems)] = check(ia3)
    assert problems == []
    assert entry is not None
    assert entry.unranked
    card = (ia3 / "seed-1/README.md").read_text()
    assert "- ia3" in card
    assert "- lora" not in card
    assert not build._factored(entry.settings)


FORGED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a layer left out": (
        lambda t: {n: v for n, v in t.items() if "layers.1.mlp" not in n},
        "trainable_parameters",
    ),
    "another layer": (
        lambda t: {n.replace("mlp.down_proj", "mlp.up_proj"): v for n, v in t.items()},
        "target_modules and the layers in the file are not the same",
    ),
    "turned": (lambda t: {n: v.reshape(v.shape[::-1]) for n, v in t.items()}, "in feedforward_modules"),
    "wider": (lambda t: {n: v.repeat(2, v.shape.index(max(v.shape))) for n, v in t.items()}, "trainable_parameters"),
    "whole numbers": (lambda t: {n: v.astype("int32") for n, v in t.items()}, "is I32, one of"),
    "flat": (lambda t: {n: v.reshape(-1) for n, v in t.items()}, "the vector is of shape"),
    "infinite": (lambda t: {n: v / 0 for n, v in t.items()}, "has NaN or infinity"),
    "factors": (lambda t: {n.replace("ia3_l", "lora_A.weight"): v for n, v in t.items()}, "is no vector of an adapter"),
    "nothing": (lambda t: {}, "has no vector"),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("what", FORGED)
def test_forged_vectors_are_refused(packed: Path, what: str) -> None:
    entry, (change, why) = from_run(packed), FORGED[what]
    assert said(packed, entry) == ""
    save_file(change(load_file(packed / ADAPTER)), packed / ADAPTER)
    assert why in "\n".join(str(p) for p in adapter_problems(packed, entry))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, "feedforward_modules = ['down_proj'] is a field"),
        ({"feedforward_modules": []}, "not [out, 1], as it is not in feedforward_modules"),
        ({"feedforward_modules": "(a+)+"}, "feedforward_modules is no list of names"),
        ({"target_modules": ".*"}, "target_modules is no list of names"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules is set; a run sets none"),
        ({"base_model_name_or_path": "another"}, "was made for 'another'"),
    ],
    ids=str,
)
def test_forged_settings_are_refused(packed: Path, changed: dict[str, Any], why: str) -> None:
    path = packed / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    assert why in said(packed, from_run(packed))


@pytest.mark.parametrize("name", ["bytes_up", "bytes_down"])
def test_fewer_bytes_than_the_vectors_take_are_refused(packed: Path, name: str) -> None:
    rounds = [json.loads(line) for line in (packed / "rounds.jsonl").read_text().splitlines()]
    entry = from_run(packed)
    each = 4 * (entry.costs.trainable_parameters or 0)
    rounds[0][name] = each * len(rounds[0]["cohort"])
    costs = entry.costs.model_copy(update={name: rounds[0][name]})
    (packed / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds))
    assert said(packed, entry.model_copy(update={"costs": costs})) == ""
    less = rounds[0][name] * 9 // 10
    (packed / "rounds.jsonl").write_text("".join(json.dumps({**r, name: less}) + "\n" for r in rounds))
    costs = entry.costs.model_copy(update={name: less})
    assert f"entry.costs.{name}: says {less:,}; fedit on these" in said(
        packed, entry.model_copy(update={"costs": costs})
    )


def test_vectors_are_held_against_the_zoo(packed: Path) -> None:
    entry = from_run(packed)
    known = entry.model_copy(update={"base": KNOWN})
    wanted = spaces.of(known.settings).on_base(known)
    assert wanted is not None
    assert len(wanted) == 3 * 30
    assert wanted["model.layers.0.mlp.down_proj"] == (1, 1536)
    assert wanted["model.layers.0.self_attn.v_proj"] == (192, 1)
    assert "its 6 layers are not the 90 that the settings adapt" in said(packed, known)


def test_the_usual_layers_are_pefts() -> None:
    from peft.utils import constants
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    assert AutoModelForCausalLM
    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    inputs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    found = {NAMES[kind]: (*names, inputs[kind]) for kind, names in targets.items() if kind in NAMES and kind in inputs}
    for architecture, layers in USUAL.items():
        *names, last = found[architecture]
        assert (tuple(names), last) == (layers, [layers[-1]])


def test_a_model_folder_is_not_packed(settings: Callable[..., Settings], tmp_path: Path) -> None:
    path = _run(settings, tmp_path / "run", "full")
    with pytest.raises(DataError, match=r'peft.kind = "full"; a model folder is no part of a submission'):
        pack([path], tmp_path / "out", "a team")
    assert not (tmp_path / "out").exists()
