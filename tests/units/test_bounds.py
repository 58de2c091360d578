"""Ranges of slopes and curvatures: never passed on dense grids, attained, constants recomputed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from torch import Tensor, nn

from flexure.contracts import FlexureError
from flexure.units import CATALOGUE, CTU, TrainableCTU, ctu, plain
from flexure.units.bounds import (
    UNBOUNDED,
    UNIT_BOUNDS,
    UnitBounds,
    centered_softplus_bounds,
    ctu_bounds,
    module_unit_bounds,
    unit_bounds,
)
from flexure.units.catalogue import SPECS
from flexure.units.extremes import (
    SIGMOID_SECOND,
    SIGMOID_THIRD,
    SILU_FOURTH,
    SILU_PEAK,
    SILU_THIRD,
)
from flexure.units.functional import MAX_SLOPE_EXCESS, centered_softplus
from tests.units.shared import DOUBLE, dial

GRID = torch.linspace(-25, 25, 400_002, dtype=DOUBLE)  # without 0
MU, SIGMA = 0.707107, 0.282095

# Activation -> parameters and the function itself.
FUNCTIONS: list[tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ("relu", {}, torch.relu),
    ("clamp", {"cap": 6.0}, F.relu6),
    ("threshold", {"cap": None}, torch.relu),
    ("zero_bound", {}, lambda x: torch.logaddexp(x, torch.zeros(1, dtype=DOUBLE))),
    ("zero_bound", {}, lambda x: torch.maximum(x, torch.zeros(1, dtype=DOUBLE))),
    ("leaky_relu", {"slope": 0.01}, F.leaky_relu),
    ("leaky_relu", {"slope": 1.5}, lambda x: F.leaky_relu(x, 1.5)),
    ("leaky_relu", {"slope": -1.0}, lambda x: F.leaky_relu(x, -1.0)),
    ("prelu", {"slope": 0.25}, lambda x: F.prelu(x, torch.full((1,), 0.25, dtype=DOUBLE))),
    ("rrelu", {"lower": 0.125, "upper": 0.25}, lambda x: F.rrelu(x, 0.125, 0.25)),
    ("silu", {}, F.silu),
    ("gelu", {"approximate": "none"}, F.gelu),
    ("gelu", {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    ("gelu_erf", {}, F.gelu),
    ("gelu_tanh", {}, lambda x: F.gelu(x, approximate="tanh")),
    ("quick_gelu", {}, lambda x: x * torch.sigmoid(1.702 * x)),
    ("softplus", {"beta": 1.0}, F.softplus),
    ("softplus", {"beta": 3.0}, lambda x: F.softplus(x, beta=3.0)),
    ("centered_softplus", {"beta": 3.0}, lambda x: centered_softplus(x, 3.0)),
    ("hardswish", {}, F.hardswish),
    ("mish", {}, F.mish),
    ("elu", {"alpha": 1.0}, F.elu),
    ("elu", {"alpha": 2.0}, lambda x: F.elu(x, 2.0)),
    ("elu", {"alpha": 0.5}, lambda x: F.elu(x, 0.5)),
    ("selu", {}, F.selu),
    ("celu", {"alpha": 0.7}, lambda x: F.celu(x, 0.7)),
    ("hardtanh", {}, F.hardtanh),
    ("hardsigmoid", {}, lambda x: (x / 6 + 0.5).clamp(0, 1)),
    ("logsigmoid", {}, F.logsigmoid),
    ("softshrink", {}, F.softshrink),
    ("tanhshrink", {}, F.tanhshrink),
    ("softsign", {}, F.softsign),
    ("tanh", {}, torch.tanh),
    ("sigmoid", {}, torch.sigmoid),
    ("erf", {}, torch.erf),
    ("laplace", {}, lambda x: 0.5 * (1 + torch.erf((x - MU) / (SIGMA * math.sqrt(2))))),
    ("clipped_gelu", {}, lambda x: F.gelu(x).clamp(-0.05, 10.0)),
    ("sqrt_softplus", {}, lambda x: torch.nn.functional.softplus(x).sqrt()),
]
IDS = [f"{name}-{'-'.join(map(str, params.values()))}" for name, params, _ in FUNCTIONS]
# The published bounds stay valid where a function is clipped or drawn at random.
NOT_ATTAINED = {"clipped_gelu", "rrelu", "zero_bound"}


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    if not slope.requires_grad:
        return slope.detach(), torch.zeros_like(x)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    return slope.detach(), bend


@pytest.mark.parametrize(("name", "params", "f"), FUNCTIONS, ids=IDS)
def test_no_slope_or_curvature_is_outside(
    name: str, params: dict[str, Any], f: Callable[[Tensor], Tensor]
) -> None:
    bounds = unit_bounds(name, **params)
    slope, bend = derivatives(f, GRID)
    jump = (slope[1:] - slope[:-1]).abs().max()
    ends, _ = derivatives(f, torch.tensor([-600.0, 600.0], dtype=DOUBLE))
    slope = torch.cat([slope, ends])
    bend = F.pad(bend, (0, 2))
    rounding = 1e-12
    assert bounds.slope_min - rounding <= slope.min()
    assert slope.max() <= bounds.slope_max + rounding
    assert bend.abs().max() <= bounds.curvature + rounding
    if bounds.relative_curvature < math.inf:
        inner = slope.abs() > 1e-8
        relative = (bend[inner] / slope[inner]).abs().max()
        assert 0.97 * bounds.relative_curvature <= relative + 1e-3
        assert relative <= bounds.relative_curvature * (1 + 1e-7)
    if name in NOT_ATTAINED:
        return
    width = bounds.slope_max - bounds.slope_min
    assert slope.min() <= bounds.slope_min + 1e-3 * width
    assert slope.max() >= bounds.slope_max - 1e-3 * width
    # Where the curvature is infinite the slope jumps: between neighbours of the grid.
    if bounds.curvature == math.inf:
        assert jump > 1e-2
    else:
        assert jump <= bounds.curvature * 1.3e-4
        assert bend.abs().max() >= bounds.curvature * (1 - 1e-3)


def test_every_row_of_the_catalogue_has_bounds_or_a_reason() -> None:
    for spec in CATALOGUE:
        assert (spec.name in UNIT_BOUNDS) != (spec.name in UNBOUNDED), spec.name
    assert set(UNIT_BOUNDS) | set(UNBOUNDED) == set(SPECS)
    assert {name for name, *_ in FUNCTIONS} == set(UNIT_BOUNDS)
    for name, why in UNBOUNDED.items():
        with pytest.raises(FlexureError, match=r"expected .* got .*; "):
            unit_bounds(name)
        assert why


def silu(x: Any) -> Any:
    return x / (1 + mpmath.exp(-x))


def gelu_tanh(x: Any) -> Any:
    inner = mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)
    return x / 2 * (1 + mpmath.tanh(inner))


# Constant, function, order of derivative, where its extreme is, sign of the extreme.
CONSTANTS = {
    "silu": (silu, {"slope_max": (1, 2.4), "slope_min": (1, -2.4), "curvature": (2, 0.0)}),
    "gelu_erf": (
        lambda x: x * mpmath.ncdf(x),
        {"slope_max": (1, 1.41), "slope_min": (1, -1.41), "curvature": (2, 0.0)},
    ),
    "gelu_tanh": (
        gelu_tanh,
        {"slope_max": (1, 1.42), "slope_min": (1, -1.42), "curvature": (2, 0.0)},
    ),
    "mish": (
        lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
        {"slope_max": (1, 1.49), "slope_min": (1, -2.256), "curvature": (2, -0.088)},
    ),
    "tanh": (mpmath.tanh, {"curvature": (2, -0.658)}),
    "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), {"curvature": (2, -1.317)}),
    "erf": (mpmath.erf, {"slope_max": (1, 0.0), "curvature": (2, -0.707)}),
    "laplace": (
        lambda x: mpmath.ncdf((x - mpmath.mpf(str(MU))) / mpmath.mpf(str(SIGMA))),
        {"slope_max": (1, MU), "curvature": (2, MU - SIGMA)},
    ),
    "sqrt_softplus": (
        lambda x: mpmath.sqrt(mpmath.log1p(mpmath.exp(x))),
        {"slope_max": (1, 0.92), "curvature": (2, -1.34)},
    ),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_recomputed_and_rounded_outward(name: str) -> None:
    f, extremes = CONSTANTS[name]
    bounds = unit_bounds(name)
    with mpmath.workdps(40):
        for field, (order, start) in extremes.items():
            at = mpmath.findroot(lambda x, n=order: mpmath.diff(f, x, n + 1), start)
            exact, stated = mpmath.diff(f, at, order), getattr(bounds, field)
            outward = stated - exact if exact > 0 else exact - stated
            assert outward >= -(mpmath.mpf(10) ** -25), (field, exact)
            assert outward <= 4 * math.ulp(stated)


def test_constants_of_the_specification() -> None:
    assert unit_bounds("silu").slope_max == pytest.approx(1.0998393201, abs=1e-10)
    assert unit_bounds("silu").slope_min == -MAX_SLOPE_EXCESS or math.isclose(
        unit_bounds("silu").slope_min, -MAX_SLOPE_EXCESS, rel_tol=1e-15
    )
    tanh = unit_bounds("tanh")
    assert (tanh.slope_max, tanh.relative_curvature) == (1.0, 2.0)
    assert tanh.curvature == pytest.approx(4 / (3 * math.sqrt(3)), abs=1e-15)
    assert centered_softplus_bounds(3.0) == UnitBounds(0.0, 1.0, 0.75, 3.0)


def test_constants_of_the_searches() -> None:
    with mpmath.workdps(30):
        peak = mpmath.findroot(lambda x: mpmath.diff(silu, x, 2), 2.4)
        assert 0 <= peak - SILU_PEAK < 1e-6
        points = [mpmath.mpf(i) / 10 for i in range(-150, 151)]
        for limit, f, order in (
            (SILU_THIRD, silu, 3),
            (SILU_FOURTH, silu, 4),
            (SIGMOID_SECOND, lambda x: 1 / (1 + mpmath.exp(-x)), 2),
            (SIGMOID_THIRD, lambda x: 1 / (1 + mpmath.exp(-x)), 3),
        ):
            largest = max(abs(mpmath.diff(f, x, order)) for x in points)
            assert limit * 0.99 < largest < limit


@settings(max_examples=60, deadline=None)
@given(dial, dial)
@example(0.0, 1.0)
@example(0.0, 0.0)
@example(1.0, 0.5)
@example(0.5, 1e-300)
def test_ctu_is_never_outside_and_attains_its_range(beta: float, c: float) -> None:
    bounds = ctu_bounds(beta, c)
    assert bounds.slope_max <= 1 + MAX_SLOPE_EXCESS * c + 1e-14
    assert bounds.slope_min == pytest.approx(1 - bounds.slope_max, abs=1e-15)
    v = torch.cat([torch.linspace(0, 40, 4001, dtype=DOUBLE), torch.logspace(1, 12, 8001).double()])
    for unit in (1.0, beta):
        if unit == 0:
            continue
        x = torch.cat([-v, v]) * (1 - beta) / unit
        slope = plain.ctu_slope(x, beta, c)
        assert bounds.slope_min - 1e-15 <= slope.min()
        assert slope.max() <= bounds.slope_max + 1e-15
        if unit == beta and 1e-250 < beta < 1:  # else the extreme is beyond float64
            assert slope.max() >= bounds.slope_max - 1e-5
    if beta < 1:
        bend = plain.ctu_curvature(torch.zeros(1, dtype=DOUBLE), beta, c).abs().item()
        tiny = 1e-300  # subnormal numbers round coarsely
        assert bend - tiny <= bounds.curvature <= bend * (1 + 1e-12) + tiny
    else:
        assert bounds.curvature == math.inf


def test_ctu_at_the_ends_of_its_dials() -> None:
    assert ctu_bounds(1.0, 0.3) == UnitBounds(0.0, 1.0, math.inf)
    assert ctu_bounds(0.0, 1.0) == UnitBounds(0.5, 0.5, 0.0, 0.0)
    soft = ctu_bounds(0.75, 0.0)
    assert (soft.slope_min, soft.slope_max) == (0.0, 1.0)
    assert soft.curvature == pytest.approx(1.0)
    assert soft.relative_curvature == pytest.approx(4.0)
    same = ctu_bounds(0.5, 1.0)
    exact = unit_bounds("silu")
    assert same.slope_max == pytest.approx(exact.slope_max, abs=1e-15)
    assert ctu_bounds(0.8, "balanced").slope_max == ctu_bounds(0.8, 0.64 / 1.64).slope_max


def test_a_ctu_per_channel() -> None:
    beta, c = torch.tensor([0.2, 0.9, 1.0]), torch.tensor([1.0, 0.5, 0.0])
    rows = [ctu_bounds(float(b), float(m)) for b, m in zip(beta.double(), c.double(), strict=True)]
    together = ctu_bounds(beta, c)
    for name in ("slope_min", "slope_max", "curvature", "relative_curvature"):
        values = getattr(together, name)
        assert values.dtype == DOUBLE
        assert values.tolist() == pytest.approx([getattr(row, name) for row in rows], rel=1e-14)
    assert together.lipschitz.tolist() == pytest.approx([row.lipschitz for row in rows])
    assert ctu_bounds(beta, 0.5).slope_max.shape == (3,)
    assert ctu_bounds(torch.tensor(0.5), 0.5).slope_max.shape == ()


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.001, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("cap", [0.1, 6.0])
def test_a_capped_ctu_is_bounded_and_attains_it(beta: float, c: float, cap: float) -> None:
    bounds = ctu_bounds(beta, c, activation="clamp", params={"cap": cap})
    width = 1 - beta
    reach = 60 * width / max(beta if c else 1.0, 1e-3)
    near = torch.linspace(-40, 40, 200_001, dtype=DOUBLE) * width
    wide = torch.linspace(-reach, cap + reach, 400_001, dtype=DOUBLE)
    x = torch.cat([near, near + cap, wide])
    slope = plain.ctu_slope(x, beta, c) - plain.ctu_slope(x - cap, beta, c)
    bend = plain.ctu_curvature(x, beta, c) - plain.ctu_curvature(x - cap, beta, c)
    assert bounds.slope_min <= slope.min()
    assert slope.max() <= bounds.slope_max
    assert bend.abs().max() <= bounds.curvature
    assert slope.min() <= bounds.slope_min + 1e-7
    assert slope.max() >= bounds.slope_max - 1e-7
    assert bend.abs().max() >= bounds.curvature * (1 - 1e-5) - 1e-7


@pytest.mark.parametrize("beta", [1e-12, 1e-8, 1 - 1e-12, 1 - 1e-15])
@pytest.mark.parametrize("c", [0.001, 1.0])
def test_a_capped_ctu_at_the_far_ends_of_its_dial(beta: float, c: float) -> None:
    bounds = ctu_bounds(beta, c, activation="clamp", params={"cap": 6.0})
    one = ctu_bounds(beta, c)
    if beta > 0.5:  # two kinks that do not see each other
        assert bounds.slope_max == pytest.approx(one.slope_max, abs=1e-12)
        assert bounds.slope_min == pytest.approx(one.slope_min, abs=1e-12)
        assert bounds.curvature == pytest.approx(one.curvature, rel=1e-11)
        assert bounds.curvature >= one.curvature * (1 - 1e-15)
    else:
        assert -3.1 * beta <= bounds.slope_min <= 0
        assert bounds.slope_max == pytest.approx((1 - c) * math.tanh(1.5), abs=1e-7)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.01, 1.0, 1.75])
@pytest.mark.parametrize(("beta", "c"), [(0.6, 1.0), (0.9, 0.5), (0.3, 0.0)])
def test_a_leaky_ctu_is_exact(slope: float, beta: float, c: float) -> None:
    unit = CTU("leaky_relu", beta=beta, c=c, params={"slope": slope})
    bounds = module_unit_bounds(unit)
    slopes, bends = derivatives(unit, torch.linspace(-80, 80, 400_001, dtype=DOUBLE))
    assert bounds.slope_min <= slopes.min() + 1e-15
    assert slopes.max() <= bounds.slope_max + 1e-15
    assert bends.abs().max() <= bounds.curvature + 1e-15
    assert slopes.min() <= bounds.slope_min + 1e-6
    assert slopes.max() >= bounds.slope_max - 1e-6
    assert bends.abs().max() >= bounds.curvature * (1 - 1e-6)


def test_calibration_scales_the_bounds() -> None:
    unit = CTU("relu", beta=torch.tensor([0.5, 0.7]), c=1.0, axis=-1, channels=2)
    before = module_unit_bounds(unit)
    unit.correct(torch.tensor([2.0, -0.5]), torch.zeros(2))
    after = module_unit_bounds(unit)
    assert after.slope_max.tolist() == [2 * before.slope_max[0], -0.5 * before.slope_min[1]]
    assert after.curvature.tolist() == [2 * before.curvature[0], 0.5 * before.curvature[1]]
    assert after.lipschitz.tolist() == pytest.approx([2 * 1.0998393, 0.5 * 1.0998393])


def test_modules() -> None:
    assert module_unit_bounds(nn.ELU(2.0)) == unit_bounds("elu", alpha=2.0)
    assert module_unit_bounds(nn.Softplus(3.0)) == unit_bounds("softplus", beta=3.0)
    assert module_unit_bounds(nn.ReLU6()) == unit_bounds("clamp", cap=6.0)
    assert module_unit_bounds(nn.PReLU(2)).slope_min.tolist() == [0.25, 0.25]
    trained = TrainableCTU("relu", channels=3, axis=-1)
    bounds = module_unit_bounds(trained)
    assert bounds.slope_max.shape == (3,)
    assert not bounds.slope_max.requires_grad
    own = nn.Parameter(torch.tensor([0.2, 1.5]))
    prelu = CTU("prelu", beta=0.8, params={"slope": own}, axis=-1, channels=2)
    assert module_unit_bounds(prelu).slope_max.shape == (2,)
    for module in (nn.Linear(2, 2), nn.Hardshrink(), nn.MaxPool2d(2), CTU("max_pool2d", beta=0.5)):
        with pytest.raises(FlexureError, match="expected"):
            module_unit_bounds(module)


def test_centered_softplus() -> None:
    for beta in (1e-3, 1.0, 40.0):
        bounds = centered_softplus_bounds(beta)
        slope, bend = derivatives(lambda x, beta=beta: centered_softplus(x, beta), GRID / beta)
        assert slope.min() >= bounds.slope_min
        assert slope.max() <= bounds.slope_max
        assert bounds.curvature * (1 - 1e-6) <= bend.abs().max() <= bounds.curvature * (1 + 1e-12)
        assert (bend / slope).abs().max() == pytest.approx(beta, rel=1e-6)
    assert centered_softplus_bounds(0.0) == UnitBounds(0.5, 0.5, 0.0, 0.0)
    assert centered_softplus_bounds(math.inf).curvature == math.inf
    several = centered_softplus_bounds(torch.tensor([0.0, 2.0]))
    assert several.slope_max.tolist() == [0.5, 1.0]
    assert several.curvature.tolist() == [0.0, 0.5]


def test_refusals() -> None:
    for call in (
        lambda: unit_bounds("elu"),
        lambda: unit_bounds("relu6"),
        lambda: unit_bounds("silu", alpha=1.0),
        lambda: ctu_bounds(1.5),
        lambda: ctu_bounds(0.5, activation="max_pool2d"),
    ):
        with pytest.raises(FlexureError, match=r"expected .* got .*; "):
            call()
    assert ctu(torch.zeros(1), 0.5).item() >= 0


@pytest.mark.parametrize("value", [-3.0, -0.5, -1e-3, 1e-3, 0.3, 1.0, 1.5, 30.0])
@pytest.mark.parametrize("cls", [nn.ELU, nn.LeakyReLU, nn.CELU, nn.Softplus, nn.PReLU])
def test_no_parameter_brings_a_module_outside(cls: type[nn.Module], value: float) -> None:
    module = cls(1, value).double() if cls is nn.PReLU else cls(value)
    if cls is nn.CELU and value < 0:
        with pytest.raises(FlexureError, match="positive alpha"):
            module_unit_bounds(module)
        return
    bounds = module_unit_bounds(module)
    slope, bend = derivatives(module, GRID[::8])
    assert float(bounds.slope_min) - 1e-12 <= slope.min()
    assert slope.max() <= float(bounds.slope_max) + 1e-12
    assert bend.abs().max() <= float(bounds.curvature) * (1 + 1e-12)
    assert bounds.lipschitz >= 0


@pytest.mark.parametrize("limits", [(-1.0, 1.0), (0.0, 6.0), (1.0, 2.0), (-3.0, -2.0)])
def test_hardtanh_between_any_limits(limits: tuple[float, float]) -> None:
    slope, _ = derivatives(nn.Hardtanh(*limits), GRID[::8])
    bounds = module_unit_bounds(nn.Hardtanh(*limits))
    assert (bounds.slope_min, bounds.slope_max) == (slope.min(), slope.max())


@pytest.mark.parametrize(
    "call",
    [
        lambda: module_unit_bounds(nn.Softplus(threshold=5.0)),
        lambda: module_unit_bounds(nn.Threshold(0.5, 0.5)),
        lambda: unit_bounds("softplus", beta=0.0),
        lambda: unit_bounds("celu", alpha=0.0),
        lambda: unit_bounds("celu", alpha=math.inf),
        lambda: unit_bounds("elu", alpha=math.nan),
        lambda: unit_bounds("leaky_relu", slope=math.nan),
        lambda: unit_bounds("gelu", approximate="sigmoid"),
        lambda: unit_bounds("clamp", cap=-1.0),
        lambda: centered_softplus_bounds(-1.0),
        lambda: centered_softplus_bounds(torch.tensor([1.0, -1.0])),
        lambda: ctu_bounds(0.5, activation="clamp", params={"cap": -1}),
        lambda: ctu_bounds(0.5, activation="clamp", params={"limit": 6.0}),
        lambda: ctu_bounds(0.5, activation="leaky_relu"),
        lambda: ctu_bounds(0.5, activation="nope"),
        lambda: ctu_bounds(torch.rand(3), torch.rand(2)),
    ],
)
def test_refuses_what_has_no_bounds(call: Callable[[], UnitBounds]) -> None:
    with pytest.raises(FlexureError, match=r"expected .* got .*; "):
        call()


@pytest.mark.parametrize("cap", [1e-3, 6.0, 1e300])
@pytest.mark.parametrize("beta", [1e-320, 1e-200, 1e-17, 1e-12, 1e-9])
def test_a_capped_ctu_at_the_smallest_dials(beta: float, cap: float) -> None:
    bounds = ctu_bounds(beta, 0.5, activation="clamp", params={"cap": cap})
    limit = ctu_bounds(0.0, 0.5, activation="clamp", params={"cap": cap})
    x = torch.cat([torch.linspace(-40, 40, 20_001, dtype=DOUBLE), torch.tensor([cap / 2])])
    slope = plain.ctu_slope(x, beta, 0.5) - plain.ctu_slope(x - cap, beta, 0.5)
    bend = plain.ctu_curvature(x, beta, 0.5) - plain.ctu_curvature(x - cap, beta, 0.5)
    assert bounds.slope_min <= slope.min() + 1e-15
    assert slope.max() <= bounds.slope_max + 1e-15
    assert bend.abs().max() <= bounds.curvature + 1e-15
    assert bounds.curvature == pytest.approx(limit.curvature, rel=1e-6, abs=2e-9)
    if cap < 10:
        assert bounds.slope_max == pytest.approx(limit.slope_max, abs=1e-7)
