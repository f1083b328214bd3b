"""One optimiser step: what is masked stays, and what SCAFFOLD adds is not clipped."""

from typing import get_args

import pytest
import torch

from fedtune.config.schema import TrainSettings
from fedtune.methods.requests import Train
from fedtune.training.executor import make_step, optimizer


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]


@pytest.mark.parametrize("name", get_args(TrainSettings.model_fields["optimizer"].annotation))
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", _devices())
def test_a_step_moves_every_number_as_in_float64(device: str, kind: torch.dtype, name: str) -> None:
    """Also where kernels take a whole vector of numbers at a time: fused ones have left those as they were."""
    made, parameters = TrainSettings(optimizer=name, weight_decay=0.1), []
    for on, dtype in ((device, kind), ("cpu", torch.float64)):
        parameter = torch.nn.Parameter(torch.linspace(1.0, 2.0, 4099, device=on, dtype=dtype))
        stepper = optimizer([([parameter], 0.25)], made)
        for _ in range(3):
            parameter.grad = torch.full_like(parameter, 0.5)
            stepper.step()
        parameters.append(parameter.detach().double().cpu())
    assert torch.allclose(*parameters, rtol=0, atol=0.03)
    assert bool((parameters[0] < torch.linspace(1.0, 2.0, 4099) - 0.3).all())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_what_a_mask_freezes_stays_bit_for_bit_under_weight_decay(name: str) -> None:
    parameter = torch.nn.Parameter(torch.linspace(0.5, 2.0, 4))
    before, mask = parameter.detach().clone(), torch.tensor([1.0, 1.0, 0.0, 0.0])
    made = optimizer([([parameter], 1e-2)], TrainSettings(optimizer=name, weight_decay=0.1))
    for _ in range(10):
        made.zero_grad(set_to_none=True)
        parameter.sum().backward()
        make_step(Train({}, ["p"], masks={"p": mask}), {"p": parameter}, [parameter], 1.0, made)
    assert torch.equal(parameter.detach()[2:], before[2:])
    assert not (parameter.detach()[:2] == before[:2]).any()


def test_what_was_trained_and_is_frozen_later_stays_although_the_optimiser_remembers_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    made = optimizer([([parameter], 1e-2)], TrainSettings())
    masks = [torch.ones(2), torch.tensor([0.0, 1.0])]
    seen = []
    for mask in masks:
        made.zero_grad(set_to_none=True)
        parameter.sum().backward()
        make_step(Train({}, ["p"], masks={"p": mask}), {"p": parameter}, [parameter], 1.0, made)
        seen.append(parameter.detach().clone())
    assert seen[1][0] == seen[0][0]
    assert seen[1][1] < seen[0][1]


def test_a_clip_bounds_the_gradient_of_the_loss_and_not_the_correction() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    made = optimizer([([parameter], 1.0)], TrainSettings(optimizer="sgd"))
    (100 * parameter[0]).backward()  # type: ignore[no-untyped-call]
    make_step(Train({}, ["p"], correction={"p": torch.tensor([0.0, 7.0])}), {"p": parameter}, [parameter], 0.5, made)
    assert parameter.detach().tolist() == pytest.approx([-0.5, -7.0])
