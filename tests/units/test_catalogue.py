"""The catalogue: every row against the function that it names, over a dense grid."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flexure.units.catalogue import CATALOGUE, SPECS, read_call, read_module
from flexure.units.functional import ctu
from flexure.units.spec import UnitSpec
from flexure.units.unit import CTU

GRID = torch.linspace(-30, 30, 60001, dtype=torch.float64)

PARAMS = {
    "clamp": [{"cap": None}, {"cap": 6.0}],
    "threshold": [{"cap": None}],
    "leaky_relu": [{"slope": 0.01}, {"slope": 0.0}, {"slope": 1.0}, {"slope": 2.5}, {"slope": -1}],
    "prelu": [{"slope": torch.tensor([0.25], dtype=torch.float64)}],
    "gelu": [{"approximate": "none"}, {"approximate": "tanh"}],
    "softplus": [{"beta": 1.0}, {"beta": 4.0}, {"beta": 0.5}],
}

STEERED = [
    pytest.param(spec, params, id=f"{spec.name}-{i}")
    for spec in CATALOGUE
    if spec.refusal is None and not spec.optional
    for i, params in enumerate(PARAMS.get(spec.name, [{}]))
]


@pytest.mark.parametrize(("spec", "params"), STEERED)
def test_stated_error_of_the_nearest_ctu(spec: UnitSpec, params: dict) -> None:
    point = spec.point(params)
    unit = CTU(spec.name, beta=point.beta, c=0.5 if point.c is None else point.c, params=params)
    error = (unit(GRID.clone()) - spec.reference(GRID, **params)).abs().max().item()
    if point.error == 0:
        # PyTorch's softplus gives up its exponential beyond 20/beta.
        assert error < (3e-9 if spec.name == "softplus" else 1e-12)
    else:
        assert 0.98 * point.error < error < point.error * (1 + 1e-9)


@pytest.mark.parametrize(
    "spec",
    [
        s
        for s in CATALOGUE
        if s.refusal is None and s.point({"approximate": "none", "beta": 0.5}).error > 0
    ],
    ids=lambda s: s.name,
)
def test_no_nearer_point_exists(spec: UnitSpec) -> None:
    params = PARAMS.get(spec.name, [{}])[-1 if spec.name == "softplus" else 0]
    point = spec.point(params)
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    target = spec.reference(x, **params)
    for db in (-0.02, -0.005, 0.0, 0.005, 0.02):
        for dc in (-0.05, -0.01, 0.0, 0.01, 0.05):
            beta, c = min(max(point.beta + db, 0), 1), min(max(point.c + dc, 0), 1)
            error = (ctu(x, beta, c) - target).abs().max().item()
            assert error > 0.985 * point.error


@pytest.mark.parametrize(("spec", "params"), STEERED)
def test_exact_at_relu_exactly_where_it_is_piecewise_affine(spec: UnitSpec, params: dict) -> None:
    at_1 = CTU(spec.name, beta=1.0, c=0.3, params=params)(GRID.clone())
    same = torch.allclose(at_1, spec.reference(GRID, **params), atol=1e-12)
    assert same == (spec.point(params).beta == 1 and spec.point(params).error == 0)


FUNCTION_ROWS = [
    pytest.param(spec, function, id=f"{spec.name}-{getattr(function, '__name__', function)}-{i}")
    for spec in CATALOGUE
    if spec.refusal is None and not spec.optional
    for i, function in enumerate(spec.functions)
]

ARGUMENTS = {
    "clamp": (0,), "clip": (0,), "clamp_min": (0,), "clamp_": (0,), "clip_": (0,),
    "clamp_min_": (0,), "hardtanh": (0, 3.0), "hardtanh_": (0, 3.0), "_threshold": (0, 0),
    "threshold": (0, 0), "threshold_": (0, 0), "leaky_relu": (0.2,), "leaky_relu_": (0.2,),
    "prelu": (torch.tensor([0.3]),),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "function"), FUNCTION_ROWS)
def test_function_is_read_as_it_computes(spec: UnitSpec, function) -> None:
    x = torch.randn(7, 5)
    args = ARGUMENTS.get(function.__name__, ())
    found, call = read_call(function, (x, *args), {})
    assert found is spec
    given = x.clone()
    expected = function(given, *args)
    torch.testing.assert_close(spec.reference(x, **call.params), expected)
    assert call.inplace == torch.equal(given, expected)
    assert call.x is x


MODULES = {
    "relu": nn.ReLU(True), "clamp": nn.ReLU6(), "threshold": nn.Threshold(0, 0),
    "leaky_relu": nn.LeakyReLU(0.3), "prelu": nn.PReLU(5), "silu": nn.SiLU(),
    "gelu": nn.GELU("tanh"), "softplus": nn.Softplus(2), "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_module_is_read_as_it_computes(name: str) -> None:
    spec, params = read_module(MODULES[name])
    assert spec.name == name
    x = torch.randn(7, 5)
    torch.testing.assert_close(spec.reference(x, **params), MODULES[name](x.clone()))


def test_named_classes_of_transformers_exist_and_compute_the_same() -> None:
    activations = pytest.importorskip("transformers.activations")
    seen = 0
    for spec in CATALOGUE:
        for cls in spec.classes:
            if not isinstance(cls, str) or not cls.startswith("transformers."):
                continue
            found = getattr(activations, cls.rpartition(".")[2], None)
            if found is None or spec.refusal is not None:
                continue
            seen += 1
            x = torch.randn(50)
            read, params = read_module(found())
            assert read is spec
            torch.testing.assert_close(
                spec.reference(x, **params), found()(x), atol=1e-3, rtol=1e-3
            )
    assert seen >= 7


def test_a_changed_forward_is_not_its_parent() -> None:
    class Squared(nn.ReLU):
        def forward(self, x):
            return F.relu(x) ** 2

    class Renamed(nn.ReLU):
        pass

    assert read_module(Squared()) is None
    assert read_module(Renamed())[0] is SPECS["relu"]


REFUSED_ARGUMENTS = {
    "gapped_max_pool": (torch.randn(2, 3, 4), 2, 1, 0, 2),
    "zero_bound": (torch.randn(3), torch.zeros(3)),
    "jump": (torch.randn(3), 1.0, 0.0),
    "hardtanh": (torch.randn(3), -1.0, 1.0),
}


def test_out_argument_and_refusals() -> None:
    x = torch.randn(3)
    assert read_call(torch.clamp, (x, 0), {"out": torch.empty(3)})[0].name == "zero_bound"
    assert read_call(torch.clamp, (x.long(), 0), {}) is None
    assert read_call(torch.tanh, (x,), {}, refused=False) is None
    for spec in CATALOGUE:
        if spec.refusal is not None:
            assert spec.reference is None
            for function in spec.functions:
                found = read_call(function, REFUSED_ARGUMENTS.get(spec.name, (x,)), {})
                assert found is not None
                assert found[0] is spec
    assert read_module(nn.Tanh())[0].refusal
    assert read_module(nn.Hardtanh())[0].name == "hardtanh"


def test_every_torch_activation_is_in_the_catalogue() -> None:
    """A new activation of PyTorch must get a row: silence is the one wrong answer."""
    import torch.nn.modules.activation as module

    other = {"MultiheadAttention", "Softmax", "Softmax2d", "LogSoftmax", "Softmin"}
    known = {cls.__name__ for spec in CATALOGUE for cls in spec.classes if inspect.isclass(cls)}
    missing = {
        name
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__
    }
    assert missing - known - other == set()
