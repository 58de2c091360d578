"""The compiled kernels against the pure path and exact references, and how they are found."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexure.contracts import FlexureError
from flexure.units import blocked
from flexure.units.functional import ctu
from flexure.units.kernels import __main__ as command
from flexure.units.kernels import build, calls, load
from tests.reference.units import exact_ctu
from tests.units.shared import DOUBLE, anything, as_dials, dial

ALL = (True, True, True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A library in a cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FLEXURE_KERNELS", raising=False)
        try:
            library = build()
        except FlexureError as error:
            pytest.skip(f"kernels cannot be built here: {error}")
        yield library
    load.cache_clear()


@pytest.fixture
def kernel(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That library, in use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(built.parent.parent))
    monkeypatch.delenv("FLEXURE_KERNELS", raising=False)
    load.cache_clear()
    assert calls.serves(torch.ones(1))
    yield
    load.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; whatever the process had loaded before is forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FLEXURE_KERNELS", raising=False)
    load.cache_clear()
    yield tmp_path / "flexure"
    load.cache_clear()


def without_kernel() -> AbstractContextManager[object]:
    return mock.patch.object(calls, "serves", return_value=False)


# Accuracy


@given(xs=st.lists(anything, min_size=1, max_size=40), beta=dial, c=dial)
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_values_and_slopes_are_exact_to_a_millionth(
    kernel: None, xs: list[float], beta: float, c: float
) -> None:
    x = torch.tensor(xs)[:, None].repeat(1, 2)
    exact = [exact_ctu(v, beta, c) for v in x[:, 0].tolist()]
    for kind in ("number", "scalar", "per channel"):
        given_dials = as_dials(beta, c, kind)
        y = blocked.ctu(x, *given_dials)
        by_x, _, _ = blocked.ctu_gradients(torch.ones_like(x), x, *given_dials, ALL)
        with without_kernel():
            pure = blocked.ctu(x, *given_dials)
            pure_by_x, _, _ = blocked.ctu_gradients(torch.ones_like(x), x, *given_dials, ALL)
        for i, (v, truth) in enumerate(zip(x[:, 0].tolist(), exact, strict=True)):
            for j in (0, 1):
                assert abs(y[i, j].item() - truth.value) <= 1e-6 * (1 + abs(v))
                assert abs(y[i, j].item() - pure[i, j].item()) <= 1e-6 * (1 + abs(v))
                assert abs(by_x[i, j].item() - truth.slope) <= 2e-6
                assert abs(by_x[i, j].item() - pure_by_x[i, j].item()) <= 2e-6


@given(x=st.floats(-40, 40, width=32), beta=st.floats(0, 0.99), c=dial)
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_derivatives_in_the_dials_are_exact_to_a_millionth(
    kernel: None, x: float, beta: float, c: float
) -> None:
    exact = exact_ctu(x, beta, c)
    for size in ((), (2,)):
        b, mix = torch.full(size, beta, dtype=DOUBLE), torch.full(size, c, dtype=DOUBLE)
        g = torch.tensor([[1.0, 1.0]]) if size else torch.tensor([[1.0]])
        _, by_beta, by_c = blocked.ctu_gradients(g, torch.full_like(g, x), b, mix, ALL)
        tolerance = 1e-6 * (1 + abs(exact.by_beta) + abs(x) / (1 - beta))
        assert (by_beta - exact.by_beta).abs().max() <= tolerance
        assert (by_c - exact.by_c).abs().max() <= 1e-6 * (1 + abs(x))


# Layouts

LAYOUTS = [
    ((7,), ()),
    ((3, 1), (1,)),
    ((20_011,), ()),
    ((4, 5, 12, 13), (5, 1, 1)),
    ((4, 5, 3, 2), (5, 1, 1)),
    ((33, 7), (7,)),
    ((5001, 3), (3,)),
    ((70, 1301), (1301,)),
    ((70, 1301), (70, 1)),
    ((5, 6, 4), (6, 1)),
    ((6, 5, 4), (6, 1, 4)),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "size"), LAYOUTS)
def test_every_layout_agrees_with_float64(
    kernel: None,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    size: tuple[int, ...],
    channels_last: bool,
    threads: int,
) -> None:
    """With pieces so small that two threads have several boundaries to get right."""
    monkeypatch.setattr(calls, "PER_THREAD", 1 << 60 if threads == 1 else 8)
    x, g = 3 * torch.randn(shape), torch.randn(shape)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    elif channels_last and len(shape) > 1:
        x = x.mT.contiguous().mT
    ends = torch.rand(size).mul(3).sub(1).clamp(0, 1)  # thirds of them at 0, at 1, and between
    pairs: list[tuple[Tensor, Tensor]] = [
        (torch.rand(size), torch.rand(size)),
        (ends, ends.roll(1)),
        (torch.tensor(0.7), torch.rand(size)),
        (torch.rand(size), torch.tensor(1.0)),
    ]
    for beta, c in pairs:
        assert_agrees_with_float64(x, g, beta, c)


def assert_agrees_with_float64(x: Tensor, g: Tensor, beta: Tensor, c: Tensor) -> None:
    wide = x.double(), beta.double(), c.double()
    y, exact = blocked.ctu(x, beta, c), blocked.ctu(*wide)
    assert y.stride() == x.stride()
    assert ((y - exact).abs() <= 1e-6 * (1 + x.abs())).all()
    got = blocked.ctu_gradients(g, x, beta, c, ALL)
    by_x, by_beta, by_c = blocked.ctu_gradients(g.double(), *wide, ALL)
    assert ((got[0] - by_x).abs() <= 2e-6 * g.abs()).all()
    inner = (1.0 - beta.double()).clamp_min(1e-3)
    scale = (g.abs() * (1 + x.abs()) / inner).sum_to_size(beta.shape if beta.dim() else ())
    assert ((got[1] - by_beta).abs() <= 2e-6 * (1 + scale)).all()
    scale = (g.abs() * (1 + x.abs())).double()
    scale = scale.sum_to_size(c.shape) if c.dim() else scale.sum()
    assert ((got[2] - by_c).abs() <= 2e-6 * (1 + scale)).all()
    alone, *_ = blocked.ctu_gradients(g, x, beta, c, (True, False, False))
    assert ((alone - by_x).abs() <= 2e-6 * g.abs()).all()
    none, *dials_only = blocked.ctu_gradients(g, x, beta, c, (False, True, True))
    assert none is None
    torch.testing.assert_close(dials_only, list(got[1:]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(), (0,), (3, 1, 1)])
def test_nothing_in_nothing_out(kernel: None, size: tuple[int, ...]) -> None:
    shape = {0: (0, 4), 1: (5, 0), 3: (0, 3, 2, 2)}[len(size)]
    x = torch.empty(shape, requires_grad=True)
    beta, c = (torch.full(size, 0.5, requires_grad=True) for _ in range(2))
    y = ctu(x, beta, c)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert not beta.grad.any()
    assert not c.grad.any()


def test_odd_memory_falls_back_or_is_copied(kernel: None) -> None:
    values = torch.randn(40, 6)
    expected = ctu(values[:, ::2].contiguous(), 0.8)
    assert torch.equal(ctu(values[:, ::2], 0.8), expected)
    negative = torch._neg_view(values)
    assert not calls.serves(negative)
    torch.testing.assert_close(ctu(negative, 0.8), ctu(-values, 0.8))
    x = values.clone().requires_grad_()
    ctu(x, 0.8).sum().backward()  # the gradient of a sum has no strides
    assert torch.equal(
        x.grad, blocked.ctu_gradients(torch.ones(40, 6), values, 0.8, 0.5, (True, False, False))[0]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, DOUBLE])
def test_only_float32_is_served(kernel: None, dtype: torch.dtype) -> None:
    assert not calls.serves(torch.ones(3, dtype=dtype))
    assert not calls.serves(torch.ones(3, device="meta"))


def test_many_threads_of_torch_are_not_replaced_by_one(
    kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert calls.serves(torch.ones(calls.SMALL))
    assert not calls.serves(torch.ones(calls.SMALL + 1))
    monkeypatch.setattr(calls, "PER_THREAD", calls.SMALL // 16)
    assert calls.serves(torch.ones(calls.SMALL + 1))


def test_a_dispatch_mode_sees_the_pure_path(kernel: None) -> None:
    class Counts(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    with Counts() as mode:
        blocked.ctu(torch.ones(3), 0.8, 0.5)
    assert mode.seen > 5


# Ends


@pytest.mark.parametrize("per_channel", [False, True])
def test_infinite_and_nan_inputs_are_those_of_the_pure_path(
    kernel: None, per_channel: bool
) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
    g = torch.ones_like(x)
    for beta, c in [(0.8, 0.5), (1.0, 0.5), (0.0, 1.0), (0.0, 0.0), (1 - 2**-24, 0.3)]:
        dials = [torch.full((9,) if per_channel else (), v) for v in (beta, c)]
        y, grads = blocked.ctu(x, *dials), blocked.ctu_gradients(g, x, *dials, ALL)
        with without_kernel():
            pure, pure_grads = blocked.ctu(x, *dials), blocked.ctu_gradients(g, x, *dials, ALL)
        torch.testing.assert_close(y, pure, equal_nan=True, rtol=1e-6, atol=1e-6)
        where = slice(2, None) if beta == 0.0 else slice(None)  # 0·inf: nan in the pure path
        torch.testing.assert_close(
            grads[0][where], pure_grads[0][where], equal_nan=True, rtol=1e-6, atol=1e-6
        )
        for got, expected in zip(grads[1:], pure_grads[1:], strict=True):
            torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_infinite_gradients_stay_outside_a_relu(kernel: None) -> None:
    x, g = torch.tensor([-1.0, 0.0, 1.0]), torch.full((3,), math.inf)
    by_x, _, _ = blocked.ctu_gradients(g, x, 1.0, 0.5, (True, False, False))
    assert by_x.tolist() == [0.0, 0.0, math.inf]


def test_in_place_writes_and_is_noticed_by_autograd(kernel: None) -> None:
    x = torch.randn(100)
    expected, version = ctu(x, 0.8), x._version
    assert ctu(x, 0.8, inplace=True) is x
    assert torch.equal(x, expected)
    assert x._version > version
    w = torch.ones(100, requires_grad=True)
    product = (w * x).sum()
    with torch.no_grad():
        ctu(x, 0.8, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        y = torch.ones(3)
        assert ctu(y, 0.5, 1.0, inplace=True) is y
    wide = torch.randn(10, 4)
    every_second, before = wide[:, ::2], ctu(wide[:, ::2], 0.8)
    assert ctu(every_second, 0.8, inplace=True) is every_second
    assert torch.equal(wide[:, ::2], before)


# Building and finding


def test_nothing_is_compiled_unasked(cache: Path) -> None:
    assert load() is None
    assert not cache.exists()
    assert torch.isfinite(ctu(torch.ones(3), 0.8)).all()


def test_the_variable_turns_them_off(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(built.parent.parent))
    load.cache_clear()
    assert load() is not None
    monkeypatch.setenv("FLEXURE_KERNELS", "0")
    load.cache_clear()
    assert load() is None
    load.cache_clear()


def test_without_a_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(FlexureError, match=r"expected a C compiler, got none .* on PATH; install"):
        build()
    assert command.main() == 1
    assert "pure Python" in capsys.readouterr().err
    assert not cache.exists()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", f"{sys.executable} -c pass", "false"])
def test_a_compiler_that_fails(cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(FlexureError, match=r"expected to build kernels with .*, got .*; set CC"):
        build()
    assert list(cache.iterdir()) == []
    assert load() is None


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:5000], lambda b: b[:-1] + b"x"])
def test_a_damaged_library_is_ignored_and_built_anew(
    built: Path, cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    cache.mkdir()
    damaged = cache / built.name
    damaged.write_bytes(damage(built.read_bytes()))
    with pytest.warns(RuntimeWarning, match=r"is damaged and is ignored; .* builds it anew"):
        assert load() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per process
        assert not calls.serves(torch.ones(3))
        assert torch.isfinite(ctu(torch.ones(3), 0.8)).all()
    assert build().read_bytes() == built.read_bytes()
    assert load() is not None
    assert len(list(cache.iterdir())) == 1


def test_a_library_that_is_whole_but_none_is_ignored(built: Path, cache: Path) -> None:
    """The digest fits, the content is no library."""
    from flexure.units.kernels.build import _digest, _key

    cache.mkdir()
    (cache / f"ctu-{_key()}-{_digest(b'none')}.so").write_bytes(b"none")
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert load() is None


def test_processes_that_build_at_once_end_in_one_good_file(built: Path, cache: Path) -> None:
    shell = [sys.executable, "-m", "flexure.units.kernels"]
    both = [subprocess.Popen(shell, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert [str(path) for path in cache.iterdir()] == sorted(said)
    assert load() is not None


def test_a_second_build_finds_the_first(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(built.parent.parent))
    monkeypatch.setenv("PATH", "")
    assert build() == built


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["0", "1"])
def test_the_units_pass_with_and_without(built: Path, switch: str) -> None:
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(here.parent), f"--ignore={here}"],
        cwd=here.parents[2],
        env={**os.environ, "FLEXURE_KERNELS": switch, "XDG_CACHE_HOME": str(built.parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
