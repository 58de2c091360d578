"""The unit with trainable dials: the same unit as with fixed ones, in every use."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from flexure.contracts import FlexureError, SiteError
from flexure.units import CTU, plain
from flexure.units.parameterization import PARAMETERIZATIONS
from flexure.units.trainable import TrainableCTU
from tests.units.shared import DOUBLE

BETA = torch.tensor([0.2, 0.8, 0.95])
C = torch.tensor([0.1, 0.5, 0.9])

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}),
    "gelu": ("gelu", {}),
    "capped": ("clamp", {"cap": 6.0}),
    "leaky": ("leaky_relu", {"slope": 0.2}),
    "steep leaky": ("leaky_relu", {"slope": 1.5}),
    "prelu": ("prelu", {"slope": nn.Parameter(torch.tensor([0.1, 0.25, 1.2]))}),
    "pool": (
        "max_pool2d",
        {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False},
    ),
}

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_row = pytest.mark.parametrize("row", PARAMETERIZATIONS)


def trainable(form: tuple[str, dict[str, Any]] = ("relu", {}), **options: Any) -> TrainableCTU:
    activation, params = form
    given = {"init_beta": BETA, "init_c": C, "channels": 3, "axis": -3, "params": params}
    return TrainableCTU(activation, **(given | options))


def fixed(form: tuple[str, dict[str, Any]], unit: TrainableCTU, **options: Any) -> CTU:
    activation, params = form
    given = {"beta": unit.beta.detach(), "c": unit.c.detach(), "params": params}
    return CTU(activation, **(given | {"channels": 3, "axis": -3} | options))


@every_row
@every_form
def test_equals_the_unit_with_fixed_dials(form: tuple[str, dict[str, Any]], row: str) -> None:
    unit = trainable(form, parameterization=row)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    expected = fixed(form, unit)(x)
    got = unit(x)
    assert torch.equal(got, expected)
    got.square().sum().backward()
    for raw in (unit.raw_beta, unit.raw_c):
        assert raw.grad is not None
        assert bool((raw.grad != 0).all())
    frozen = unit.frozen()
    assert torch.equal(frozen(x), expected)
    assert {*dict(frozen.named_parameters())} == {*dict(unit.named_parameters())} & {"weight"}


@every_row
@every_form
def test_gradients_through_the_raw_parameters(form: tuple[str, dict[str, Any]], row: str) -> None:
    unit = trainable(form, parameterization=row).double()
    assert unit.raw_beta.dtype == DOUBLE
    x = torch.randn(2, 3, 2, 2, dtype=DOUBLE, requires_grad=True)
    named = {key: value.detach().requires_grad_() for key, value in unit.named_parameters()}

    def call(x: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(unit, dict(zip(named, values, strict=True)), (x,))
        return out

    assert gradcheck(call, (x, *named.values()))


def test_counts_a_pair_a_channel_and_the_networks_own() -> None:
    assert [(k, tuple(p.shape)) for k, p in trainable().named_parameters()] == [
        ("raw_beta", (3,)),
        ("raw_c", (3,)),
    ]
    form = FORMS["prelu"]
    unit = trainable(form)
    assert unit.weight is form[1]["slope"]
    assert unit.frozen().weight is unit.weight


@pytest.mark.parametrize("axis", [-1, -3])
def test_axes(axis: int) -> None:
    unit = trainable(axis=axis)
    x = torch.randn(2, 3, 5, 3)
    over = (3,) if axis == -1 else (3, 1, 1)
    torch.testing.assert_close(unit(x), plain.ctu(x, BETA.view(over), C.view(over)))
    with pytest.raises(SiteError, match="expected 3 channels"):
        unit(torch.randn(2, 4, 4, 4))


@pytest.mark.parametrize("name", ["relu", "capped", "leaky", "steep leaky"])
def test_in_place(name: str) -> None:
    unit = trainable(FORMS[name], inplace=True)
    source = torch.randn(2, 3, 4, 4, requires_grad=True)
    x = source * 1.0
    y = unit(x)
    assert y is x
    leaves = (source, unit.raw_beta, unit.raw_c)
    got = torch.autograd.grad(y.square().sum(), leaves)
    expected = torch.autograd.grad(unit(source, inplace=False).square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_saves_nothing_of_the_inputs_size_but_the_input() -> None:
    unit = trainable()
    x = torch.randn(8, 3, 16, 16, requires_grad=True)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        unit(x)
    large = [t for t in saved if t.numel() > 3]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()


@every_row
def test_survives_copies_files_and_state_dicts(row: str) -> None:
    unit = trainable(parameterization=row)
    x = torch.randn(2, 3, 4, 4)
    for copied in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert torch.equal(copied(x), unit(x))
        assert copied.raw_beta is not unit.raw_beta
        assert copied.parameterization == row
    other = trainable(init_beta=0.5, init_c=0.5, parameterization=row)
    assert not torch.equal(other(x), unit(x))
    assert list(unit.state_dict()) == ["raw_beta", "raw_c"]
    other.load_state_dict(unit.state_dict())
    assert torch.equal(other(x), unit(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_dials_exact(dtype: torch.dtype) -> None:
    unit = trainable()
    raw = unit.raw_beta
    before = unit.beta.detach().clone()
    unit.to(dtype)
    assert unit.raw_beta is raw
    assert unit.raw_beta.dtype == unit.raw_c.dtype == torch.float32
    assert torch.equal(unit.beta, before)
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    y = unit(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, fixed(("relu", {}), unit)(x.float()).to(dtype))
    y.sum().backward()
    assert unit.raw_beta.grad is not None
    assert unit.raw_beta.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_to_half_precision_leaves_gradients_to_the_optimiser(dtype: torch.dtype) -> None:
    unit = TrainableCTU(channels=3, axis=-1)
    unit(torch.randn(5, 3)).sum().backward()
    before = [(p, p.detach().clone(), p.grad.clone()) for p in unit.parameters()]
    unit.to(dtype)
    assert all(torch.equal(p.grad, gradient) for p, _, gradient in before)
    torch.optim.SGD(unit.parameters(), 0.1).step()
    assert all(torch.allclose(p, value - 0.1 * gradient) for p, value, gradient in before)
    unit.double()
    assert all(p.grad.dtype == p.dtype == torch.float64 for p in unit.parameters())


def test_autocast() -> None:
    unit = trainable()
    layer = nn.Conv2d(1, 3, 3)
    x = torch.randn(2, 1, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = unit(layer(x))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert unit.raw_c.grad is not None
    assert unit.raw_c.grad.dtype == torch.float32


@every_row
def test_forward_mode(row: str) -> None:
    unit = trainable(parameterization=row).double()
    x = torch.randn(2, 3, 2, 2, dtype=DOUBLE)
    named = {key: value.detach() for key, value in unit.named_parameters()}
    tangents = {key: torch.rand_like(value) for key, value in named.items()}

    def call(values: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(unit, values, (x,))
        return out

    _, got = torch.func.jvp(call, (named,), (tangents,))
    h = 1e-6
    ahead, behind = (
        call({k: v + sign * h * tangents[k] for k, v in named.items()}) for sign in (1, -1)
    )
    torch.testing.assert_close(got, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@every_row
def test_compiles_as_one_graph(row: str) -> None:
    unit = trainable(parameterization=row)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    leaves = (x, unit.raw_beta, unit.raw_c)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(unit(x).square().sum(), leaves)
    for a, b in zip(torch.autograd.grad(compiled(x).square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@every_row
def test_exports_trainable_and_frozen(row: str) -> None:
    unit = trainable(parameterization=row)
    x = torch.randn(2, 3, 4, 4)
    for module, names in ((unit, {"raw_beta", "raw_c"}), (unit.frozen(), set())):
        program = torch.export.export(nn.Sequential(module), (x,))
        torch.testing.assert_close(program.module()(x), unit(x))
        assert {*dict(program.named_parameters())} == {f"0.{name}" for name in names}


def test_dialling_keeps_the_parameters() -> None:
    unit = trainable()
    raws = unit.raw_beta, unit.raw_c
    unit.correct(torch.ones(3), torch.ones(3))
    unit.dial(1.0, "balanced")
    assert (unit.raw_beta, unit.raw_c) == raws
    assert unit.shift is None
    assert torch.equal(unit.beta, torch.ones(3))
    assert torch.equal(unit.c, torch.full((3,), 0.5))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(unit(x), x.relu())
    unit.dial(BETA, 0.0)
    assert torch.equal(unit.beta, BETA)
    assert repr(unit) == "TrainableCTU(relu, beta=(3,), c=(3,), reflected)"


def test_frozen_keeps_calibration_and_mode() -> None:
    unit = trainable().eval()
    unit.correct(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.1, 0.0, -1.0]))
    frozen = unit.frozen()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(frozen(x), unit(x))
    assert not frozen.training
    with torch.no_grad():
        unit.raw_beta.fill_(0.1)
    assert not torch.equal(frozen(x), unit(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_beta": 1.0}, r"expected init_beta where training can move it, got 1"),
        ({"init_beta": torch.tensor([0.5, 1.0, 0.5])}, "start inside"),
        ({"init_beta": 1 - 1e-9}, "start inside"),
        ({"parameterization": "sigmoid", "init_c": 0.0}, "expected init_c .* got 0"),
        ({"init_beta": 1.5}, r"expected beta in \[0, 1\]"),
        ({"init_c": torch.full((2,), 0.5)}, r"expected c .* shape \(3,\), got \(2,\)"),
        ({"parameterization": "tanh"}, "expected a parameterization"),
        ({"channels": None}, "channel axis is not known"),
    ],
)
def test_bad_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexureError, match=message):
        trainable(**options)


def test_ends_that_training_can_leave_are_fine() -> None:
    unit = trainable(init_beta=0.0, init_c=torch.tensor([0.0, 1.0, 0.5]))
    assert torch.equal(unit.c, torch.tensor([0.0, 1.0, 0.5]))
