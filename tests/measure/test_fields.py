"""Scalar fields of models: margins in many digits, targets, examples, refusals, modes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flexure.contracts import FlexureError
from flexure.measure.curvature import curvature
from flexure.measure.fields import Field, margin, measuring, scalar_field
from tests.measure.untouched import untouched
from tests.reference.curvature import margin_digits

DOUBLE = torch.float64

logits_drawn = st.lists(st.floats(-300, 300, width=32), min_size=2, max_size=6)


@settings(max_examples=100, deadline=None)
@given(logits_drawn, st.integers(0, 5))
def test_margin_is_the_log_odds_of_the_label(values: list[float], label: int) -> None:
    y = label % len(values)
    found = margin(torch.tensor([values], dtype=DOUBLE), torch.tensor([y]))
    true = margin_digits(torch.tensor(values, dtype=DOUBLE), y)
    assert found.item() == pytest.approx(true, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("y", [0, 1])
def test_margin_in_float32_when_surely_right_and_surely_wrong(y: int) -> None:
    logits = torch.tensor([[60.0, -60.0, -60.5, -61.0]])
    found = margin(logits, torch.tensor([y]))
    true = margin_digits(logits[0], y)
    assert found.item() == pytest.approx(true, rel=1e-6)
    # The derivative is the log-odds' own: nothing has cancelled.
    z = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(margin(z, torch.tensor([y])).sum(), z)
    assert slope[0, y].item() == pytest.approx(1)
    others = torch.cat([logits[0, :y], logits[0, y + 1 :]]).softmax(0)
    torch.testing.assert_close(-torch.cat([slope[0, :y], slope[0, y + 1 :]]), others)


def test_margin_of_two_classes_is_their_difference() -> None:
    logits = torch.tensor([[3.0, -2.0], [1.5, 4.0]])
    assert margin(logits, torch.tensor([0, 0])).tolist() == [5.0, -2.5]


def test_margin_gives_the_cross_entropy_twice_differentiably() -> None:
    logits = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 0])
    loss = F.softplus(-margin(logits, y))
    torch.testing.assert_close(loss, F.cross_entropy(logits, y, reduction="none"))
    assert torch.autograd.gradcheck(lambda z: margin(z, y), logits)
    assert torch.autograd.gradgradcheck(lambda z: margin(z, y), logits)


def test_margin_with_ties_keeps_its_derivatives() -> None:
    logits = torch.zeros(1, 4, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(margin(logits, torch.tensor([1])).sum(), logits)
    third = 1 / 3
    torch.testing.assert_close(slope, torch.tensor([[-third, 1.0, -third, -third]], dtype=DOUBLE))


def made(model: nn.Module, x: object, y: Tensor | None = None, **options: object) -> Field:
    with measuring(model):
        return scalar_field(model, x, y, **options)  # type: ignore[arg-type]


def test_labels_predictions_targets_outputs_and_functions() -> None:
    x = torch.randn(4, 3)
    model, single = nn.Linear(3, 5), nn.Linear(3, 1)
    z = model(x).detach()
    y = torch.tensor([1, 0, 4, 2])
    field = made(model, x, y)
    assert field.is_margin
    torch.testing.assert_close(field(x), margin(z, y))
    predicted = made(model, x)
    assert predicted.is_margin
    torch.testing.assert_close(predicted(x), margin(z, z.argmax(1)))
    # The label stays what it was, wherever the field is evaluated.
    elsewhere = torch.randn(4, 3)
    torch.testing.assert_close(predicted(elsewhere), margin(model(elsewhere), z.argmax(1)))
    output = made(single, x)
    assert not output.is_margin
    torch.testing.assert_close(output(x), single(x).squeeze(1))
    flat = made(nn.Sequential(single, nn.Flatten(0)), x)
    torch.testing.assert_close(flat(x), single(x).squeeze(1))
    target = torch.randn(4, 5)
    error = made(model, x, target)
    assert not error.is_margin
    torch.testing.assert_close(error(x), (z - target).square().sum(1) / 2)
    own = made(model, x, y, field=lambda x: model(x).square().sum(1))
    assert not own.is_margin
    torch.testing.assert_close(own(x), z.square().sum(1))


def test_fields_of_some_samples_keep_their_targets_and_other_inputs() -> None:
    class Masked(nn.Module):
        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return (inputs_embeds * attention_mask[..., None]).sum(1)

    x = {"inputs_embeds": torch.randn(4, 3, 2), "attention_mask": torch.randint(2, (4, 3))}
    y = torch.tensor([0, 1, 1, 0])
    field = made(Masked(), x, y)
    rows = torch.tensor([3, 0, 0])
    part = field.taken(rows)
    assert len(part) == 3
    torch.testing.assert_close(part(part.x), field(field.x)[rows])
    torch.testing.assert_close(field.taken(slice(1, 3))(field.x[1:3]), field(field.x)[1:3])


def test_the_point_has_no_graph_and_is_not_overwritten() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2).flatten(1)

    x = torch.randn(2, 3, requires_grad=True)
    assert not made(nn.Linear(3, 2), x).x.requires_grad
    x = torch.randn(2, 3)
    with untouched(None, x):
        made(InPlace(), x)


REFUSED = {
    "tokens": ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, None, "inputs_embeds"),
    "two inputs": ((torch.ones(2, 3), torch.ones(2, 3)), None, "exactly one"),
    "half precision": (torch.ones(2, 3).half(), None, "float32"),
    "no batch": (torch.ones(3), None, r"\(B, \*shape\)"),
    "no samples": (torch.ones(0, 3), None, "at least one"),
    "another batch": (torch.ones(2, 3), torch.zeros(3, dtype=torch.int64), "one target"),
    "an unknown class": (torch.ones(2, 3), torch.tensor([0, 5]), "from 0 to 4"),
    "a negative class": (torch.ones(2, 3), torch.tensor([0, -1]), "from 0 to 4"),
    "targets of another shape": (torch.ones(2, 3), torch.ones(2, 1), "output's shape"),
}


@pytest.mark.parametrize(("x", "y", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(x: object, y: Tensor | None, message: str) -> None:
    model = nn.Linear(3, 5)
    with untouched(model), pytest.raises(FlexureError, match=message), measuring(model):
        scalar_field(model, x, y)(torch.ones(2, 3))


def test_refuses_outputs_that_are_no_logits_and_fields_that_are_not_per_sample() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(FlexureError, match="field="):
        made(nn.Unflatten(1, (1, 3)), x)
    with pytest.raises(FlexureError, match="one value for each"):
        made(nn.Identity(), x, field=lambda x: x.sum())(x)


def test_measuring_evaluates_and_puts_everything_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    model[2].eval()
    x = torch.randn(2, 3)
    with untouched(model), torch.no_grad(), torch.autocast("cpu"), measuring(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model(x.clone().requires_grad_()).requires_grad
        assert model(x).dtype == torch.float32
    with untouched(model), pytest.raises(RuntimeError, match="on purpose"), measuring(model):
        raise RuntimeError("on purpose")


def test_inputs_made_in_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(2, 3)
    model = nn.Linear(3, 4)
    with torch.inference_mode():
        field = made(model, x, torch.tensor([0, 1]))
    assert math.isfinite(field(field.x).sum().item())


@pytest.mark.parametrize(
    ("y", "told"),
    [
        (torch.tensor(0), "for each of 6 samples, got a single number"),
        (torch.zeros(6, 1, dtype=torch.int64), r"labels of shape \(6,\).*shape \(6, 1\)"),
        (torch.zeros(6, dtype=torch.complex64), "got torch.complex64"),
    ],
)
def test_targets_are_checked_as_they_were_given(y: torch.Tensor, told: str) -> None:
    with pytest.raises(FlexureError, match=told):
        curvature(nn.Linear(3, 3), torch.randn(6, 3), y)


def test_a_lazy_model_is_told_to_be_called_first() -> None:
    with pytest.raises(FlexureError, match="call the model once"):
        curvature(nn.LazyLinear(3), torch.randn(6, 3), torch.arange(6) % 3)
