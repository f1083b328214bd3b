"""An adapter folder read layer by layer is what safetensors reads whole, and costs no more the more layers it has."""

import json
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from fedtune.lora.state import PREFIX, A, B, M
from fedtune.models.folder import FolderState, checked
from fedtune.models.source import CONFIG, WEIGHTS
from fedtune.types import AdapterError, CorruptFileError


def _write(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> dict[str, torch.Tensor]:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **settings}
    (folder / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5])
def test_each_layer_has_the_numbers_that_safetensors_reads(tmp_path: Path, kind: torch.dtype, width: int) -> None:
    shapes = {A: (2, width), B: (3, 2), M: (3,)}
    names = {PREFIX + path + end: shape for path in ("l.1.q", "l.0.q", "l.10.k") for end, shape in shapes.items()}
    wanted = _write(tmp_path, {name: torch.randn(shape).to(kind) for name, shape in names.items()}, use_dora=True)
    state = FolderState(tmp_path)
    assert list(state) == ["l.0.q", "l.1.q", "l.10.k"]
    for path, module in state.items():
        for end, tensor in ((A, module.a), (B, module.b), (M, module.magnitude)):
            assert tensor is not None
            assert tensor.dtype == kind
            assert torch.equal(tensor, wanted[PREFIX + path + end])
    with pytest.raises(KeyError):
        state["l.2.q"]


def test_the_header_is_read_once_however_many_layers_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {A: torch.ones(2, 1), B: torch.ones(1, 2)}
    _write(tmp_path, {f"{PREFIX}l.{i}.q{end}": i * t for i in range(300) for end, t in one.items()})
    state = FolderState(tmp_path)
    monkeypatch.setattr(safetensors, "safe_open", None)
    monkeypatch.setattr("fedtune.models.folder.tensor_header", None)
    assert all(float(module.b[0, 0]) == int(path.split(".")[1]) for path, module in state.items())


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    _write(tmp_path, {PREFIX + "q" + A: torch.ones(2, 1), PREFIX + "q" + B: torch.ones(1, 2)})
    state = FolderState(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(CorruptFileError, match="changed while it was read"):
        state["q"]


LAYERS = {PREFIX + f"l.{i}.q" + end: torch.ones(s) for i in (0, 1) for end, s in ((A, (2, 3)), (B, (4, 2)), (M, (4,)))}
FACTORS = {n: t for n, t in LAYERS.items() if not n.endswith(M)}


@pytest.mark.parametrize(
    ("tensors", "dora", "said"),
    [
        (FACTORS, True, "use_dora = true, but l.0.q has no magnitudes"),
        ({n: t for n, t in LAYERS.items() if n != PREFIX + "l.1.q" + M}, True, "use_dora = true, but l.1.q has no"),
        (LAYERS, False, "l.0.q has magnitudes, but .* does not say use_dora = true"),
        ({**FACTORS, PREFIX + "l.1.q" + M: torch.ones(4)}, False, "l.1.q has magnitudes, but"),
        ({**LAYERS, PREFIX + "l.1.q" + M: torch.ones(3)}, True, r"l.1.q has magnitudes \(3,\) for 4 rows"),
        ({**FACTORS, PREFIX + "l.1.q" + A: torch.ones(2, 0)}, False, r"l.1.q is empty: A is \(2, 0\)"),
        ({**FACTORS, PREFIX + "l.1.q" + B: torch.ones(0, 2)}, False, r"l.1.q is empty: .* B \(0, 2\)"),
    ],
)
def test_magnitudes_are_those_that_the_settings_say_and_no_layer_is_empty(
    tensors: dict[str, torch.Tensor], dora: bool, said: str, tmp_path: Path
) -> None:
    _write(tmp_path, tensors, use_dora=dora)
    with pytest.raises(AdapterError, match=said):
        FolderState(tmp_path)


def test_a_folder_whose_name_is_not_utf_8_is_named(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"a\xffb")
    folder.mkdir()
    _write(folder, {PREFIX + "l.q" + A: torch.ones(2, 3), PREFIX + "l.q" + B: torch.ones(3, 2)})
    with pytest.raises(AdapterError, match=r"a\\udcffb': its name is not UTF-8; rename it"):
        checked(folder)
