"""The mechanism that jets and bounds share, with the plainest thing to carry: another tensor."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from flexure import FlexureError, units
from flexure.measure.propagate import (
    GENERAL,
    Carrying,
    Unsupported,
    by_body,
    primal_of,
    refused,
    rule_table,
)


def on_both(function: Any, args: Any, kwargs: Any) -> Any:
    """The rule of a tensor that carries its double: what is done to one is done to the other."""
    like = next(a for a in args if isinstance(a, Carrying))
    carried = [a.carried if isinstance(a, Carrying) else a for a in args]
    primal = function(*map(primal_of, args), **kwargs)
    second = function(*carried, **kwargs)
    if isinstance(primal, tuple):
        return tuple(type(like).of(p, c) for p, c in zip(primal, second, strict=True))
    return type(like).of(primal, second)


def set_item(function: Any, args: Any, kwargs: Any) -> Any:
    x, index, value = args
    return type(x).of(x.primal.index_put(index, value), x.carried.index_put(index, value))


class Twin(Carrying):
    subject = "twin"
    rules = rule_table(
        {
            **GENERAL,
            "add sub mul div truediv floordiv pow matmul neg exp view reshape flatten transpose "
            "chunk clone to float silu T expand contiguous sum select": on_both,
            "softmin": by_body,
            "dropout": lambda function, args, kwargs: args[0],
            "zero": lambda function, args, kwargs: torch.zeros(args[0].shape),
            "relu": refused("it is not for twins; use silu"),
        }
    )

    def constant(self, primal: Tensor) -> Twin:
        return Twin.of(primal, primal)

    @classmethod
    def unit_rule(cls, name: str, x: Any, *dials: Any) -> Any:
        if name == "soft_maximum":
            raise Unsupported("no maximum of twins; use two of them")
        return Twin.of(
            getattr(units, name)(x.primal, *dials), getattr(units, name)(x.carried, *dials)
        )


def twin(*shape: int, dtype: torch.dtype = torch.float32) -> Twin:
    return Twin.of(torch.rand(*shape).to(dtype) + 1, torch.rand(*shape).to(dtype) + 2)


def same(found: Any, expected: Callable[[Tensor], Tensor], x: Twin) -> None:
    assert isinstance(found, Twin)
    for ours, theirs in ((found.primal, x.primal), (found.carried, x.carried)):
        wanted = expected(theirs)
        assert ours.dtype == wanted.dtype
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


# --- it is a tensor ---------------------------------------------------------------------------


def test_queries_are_answered_from_the_primal() -> None:
    x = twin(2, 3, dtype=torch.float64)
    assert isinstance(x, Tensor)
    assert (x.shape, x.size(1), x.dim(), x.ndim, len(x)) == ((2, 3), 3, 2, 2, 2)
    assert (x.dtype, x.device.type, x.numel()) == (torch.float64, "cpu", 6)
    assert x.is_floating_point()
    assert torch.is_floating_point(x)
    assert not x.requires_grad
    assert Twin.of(torch.ones(2, requires_grad=True), torch.ones(2)).requires_grad
    assert x.stride() == (3, 1)
    assert x.is_contiguous()
    assert torch.result_type(x, torch.ones(1)) == torch.float64
    assert type(torch.zeros_like(x)) is Tensor
    assert x.new_ones(2).dtype == torch.float64
    assert "Twin" in repr(x)
    assert {x: 1}[x] == 1


def test_spellings_of_an_operation_share_a_rule() -> None:
    x, y = twin(2, 2), torch.rand(2, 2) + 1
    for found in (x + y, y + x, torch.add(x, y), x.add(y), operator.add(x, y), torch.add(y, x)):
        same(found, lambda t: t + y, x)
    for found in (x - y, torch.sub(x, y), x.sub(other=y)):
        same(found, lambda t: t - y, x)
    same(y - x, lambda t: y - t, x)
    same(1 - x, lambda t: 1 - t, x)
    same(2 / x, lambda t: 2 / t, x)
    same(2**x, lambda t: 2**t, x)
    same(y @ x, lambda t: y @ t, x)
    same(-x, torch.neg, x)
    same(x.T, lambda t: t.T, x)
    same(torch.exp(input=x), torch.exp, x)
    same(F.silu(x), F.silu, x)


@settings(max_examples=30, deadline=None)
@given(
    left=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    right=st.sampled_from([torch.float32, torch.float64, torch.int64]),
    shape=st.sampled_from([(3,), (2, 3), (2, 1), (1, 1, 1), ()]),
)
def test_broadcasting_and_promotion(
    left: torch.dtype, right: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, y = twin(2, 3, dtype=left), (3 * torch.ones(shape)).to(right)
    same(x * y, lambda t: t * y, x)
    same(y / x, lambda t: y / t, x)


# --- in place ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x.mul_(x),
        lambda x: operator.iadd(x, 1),
        lambda x: operator.itruediv(x, 2),
        lambda x: F.silu(x, inplace=True),
        lambda x: F.silu(x, True),
        lambda x: nn.SiLU(inplace=True)(x),
        lambda x: torch.neg_(x),
    ],
)
def test_in_place_gives_what_out_of_place_gives(change: Callable[[Any], Any]) -> None:
    x = twin(2, 3)
    primal, carried = x.primal.clone(), x.carried.clone()
    held = x.primal
    found = change(x)
    assert found is x
    torch.testing.assert_close(x.primal, change(primal.clone()), rtol=0, atol=0)
    torch.testing.assert_close(x.carried, change(carried.clone()), rtol=0, atol=0)
    torch.testing.assert_close(held, primal, rtol=0, atol=0)  # the caller's tensor


def test_in_place_keeps_the_dtype_and_refuses_another_shape() -> None:
    x = twin(2, 3)
    x.add_(torch.ones(3, dtype=torch.float64))
    assert x.dtype == x.primal.dtype == torch.float32
    with pytest.raises(FlexureError, match="does not fit"):
        x.add_(torch.ones(4, 2, 3))
    x.zero_()
    assert torch.equal(x.carried, torch.zeros(2, 3))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(3, 2),
        lambda x: x.flatten(),
        lambda x: x.T,
        lambda x: x.chunk(2)[1],
        lambda x: x.view(6).view(2, 3),
    ],
)
def test_in_place_is_refused_where_a_view_shares_the_memory(view: Callable[[Any], Any]) -> None:
    x = twin(2, 3)
    y = view(x)
    for target in (x, y):
        with pytest.raises(FlexureError, match="shares memory"):
            target.add_(1)
    y.clone().add_(1)
    (x * 1).add_(1)


def test_in_place_is_allowed_when_the_views_are_gone() -> None:
    x = twin(2, 3)
    x = x.view(3, 2)
    x.add_(1)
    assert torch.equal(x.view(6).primal, x.primal.flatten())


def test_results_are_never_written_into_plain_tensors() -> None:
    x = twin(2, 3)
    for write in (
        lambda: torch.zeros(2, 3).add_(x),
        lambda: operator.iadd(torch.zeros(2, 3), x),
        lambda: torch.add(x, 1, out=torch.zeros(2, 3)),
    ):
        with pytest.raises(FlexureError, match=r"carries nothing"):
            write()


# --- refusals ---------------------------------------------------------------------------------

CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "__bool__": bool,
    "__float__": float,
    "__int__": int,
    "__index__": lambda x: [1, 2][x],
    "item": lambda x: x.item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "__array__": np.asarray,
    "gt": lambda x: x > 0,
    "ge": lambda x: x >= 0,
    "__eq__": lambda x: x == 1,
    "equal": lambda x: torch.equal(x, x),
    "isnan": torch.isnan,
    "argmax": lambda x: x.argmax(),
    "any": lambda x: x.any(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "full_like": lambda x: torch.full_like(x, x),
    "long": lambda x: x.long(),
    "relu": torch.relu,
    "lgamma": torch.lgamma,
    "requires_grad_": lambda x: x.requires_grad_(),
    "aten.exp": torch.ops.aten.exp,
    "copy.deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "units.soft_maximum": lambda x: units.pooling.soft_maximum(x.view(1), 0.5),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_what_would_drop_the_carried_part_is_refused_by_name(name: str) -> None:
    with pytest.raises(FlexureError, match=rf"twin can pass, got .*{name}\b"):
        CONVERSIONS[name](Twin.of(torch.ones(()), torch.ones(())))


def test_the_reason_of_a_rule_is_given() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.ReLU()))
    with pytest.raises(FlexureError, match=r"relu in module '1\.0' \(ReLU\): .* use silu"):
        model(twin(2, 3))


BELOW: dict[str, Callable[[Tensor], Any]] = {
    "aten.add": torch.vmap(lambda row: row + 1),
    "aten.pow": torch.func.grad(lambda x: (x**2).sum()),
    "aten.sin": torch.func.jacrev(torch.sin),
    "aten.detach": torch.tensor,
    "aten.alias": lambda x: x.as_subclass(Tensor),
    "aten.set_": lambda x: torch.ones(2, 3).set_(x),
    "aten._local_scalar_dense": lambda x: torch.full((2,), x.select(0, 0).select(0, 0)),
}


@pytest.mark.parametrize("name", BELOW)
def test_code_that_gets_round_the_rules_is_refused(name: str) -> None:
    x = Twin.of(torch.rand(2, 3), torch.rand(2, 3))
    with pytest.raises(
        FlexureError, match=rf"expected operations that a twin can pass, got {name}"
    ):
        BELOW[name](x)


def test_arguments_that_a_rule_has_not_are_refused() -> None:
    class Narrow(Twin):
        rules = rule_table({"sum": lambda function, args, kwargs: (lambda x, dim: x)(*args)})

    x = Narrow.of(torch.rand(2), torch.rand(2))
    with pytest.raises(FlexureError, match=r"Tensor\.sum.*not known here.*argument: 'dim'"):
        x.sum()


@pytest.mark.parametrize("call", [
    lambda x: torch.sum(x=x, axis=1), lambda x: x.sum(axis=1), lambda x: torch.sum(a=x, dim=1),
    lambda x: torch.sum(input=x, dim=1), lambda x: torch.sum(x1=x, dim=1),
])  # fmt: skip
def test_names_of_numpy_are_those_of_torch(call: Any) -> None:
    x = twin(2, 3)
    try:
        torch.Tensor(call(x.primal))
    except TypeError:
        pytest.skip("torch does not take it")
    same(call(x), lambda t: t.sum(1), x)


def test_an_unknown_name_in_a_table_is_a_mistake() -> None:
    with pytest.raises(FlexureError, match="frobnicate"):
        rule_table({"frobnicate": on_both})


# --- around it --------------------------------------------------------------------------------


def test_python_functions_of_torch_run_their_own_body() -> None:
    class Negating(Twin):
        rules = rule_table({"softmin": by_body, "neg": on_both, "softmax": on_both})

    x = Negating.of(torch.rand(2, 3), torch.rand(2, 3))
    found = F.softmin(x, 1)
    torch.testing.assert_close(found.carried, F.softmin(x.carried, 1))


def test_units_are_one_operation() -> None:
    x = twin(2, 3)
    same(units.ctu(x, 0.7, 0.2), lambda t: units.ctu(t, 0.7, 0.2), x)
    same(units.centered_softplus(x, 3.0), lambda t: units.centered_softplus(t, 3.0), x)
    beta = torch.rand(3)
    before = Twin.of(x.primal, x.carried)
    assert units.ctu(x, beta, inplace=True) is x
    same(x, lambda t: units.ctu(t, beta), before)
    with pytest.raises(FlexureError, match="broadcast"):
        units.ctu(x, torch.rand(5))


def test_function_modes_see_the_calls_first() -> None:
    class Doubling(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is F.silu:
                return args[0] * 2
            return func(*args, **(kwargs or {}))

    x = twin(2, 3)
    with Doubling():
        same(F.silu(x) + 1, lambda t: t * 2 + 1, x)


def test_what_is_carried_is_differentiable() -> None:
    weight = torch.rand(3, 2, requires_grad=True)
    x = twin(2, 3)
    (x @ weight).exp().carried.sum().backward()
    expected = torch.autograd.grad((x.carried @ weight).exp().sum(), weight)[0]
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)
