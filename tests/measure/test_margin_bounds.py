"""Bounds of differences of logits: never below what is found, exact where networks are linear."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flexure.measure.lipschitz import lipschitz_bound
from flexure.measure.margin_bounds import margin_bounds
from flexure.measure.wide import in_float64
from tests.measure.test_lipschitz import NETWORKS, built
from tests.measure.untouched import untouched
from tests.reference.dense_hessian import logit_jacobian

ROUNDING = 1 + 1e-12


class Ending(nn.Module):
    """Logits (1, 3) made of what a network gives, in any way."""

    def __init__(self, ending: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.LeakyReLU(0.1))
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)
        self.wide = nn.Linear(12, 3)
        self.ending = ending

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if self.ending is joined:
            return self.wide(torch.cat([h, -h], 1))
        return self.ending(self.left(h), self.right(h))


def joined(a: Tensor, b: Tensor) -> Tensor:
    raise NotImplementedError


FACTORS = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)

ENDINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference": lambda a, b: a - b,
    "sum": lambda a, b: a + b,
    "negative": lambda a, b: -a,
    "divided": lambda a, b: a / -0.3,
    "factors": lambda a, b: FACTORS * a,
    "permuted": lambda a, b: a.flip(1),
    "activation": lambda a, b: a.tanh(),
    "activation's factors": lambda a, b: FACTORS * a.relu(),
    "maximum": lambda a, b: torch.maximum(a, b),
    "pooled": lambda a, b: torch.nn.functional.max_pool1d(torch.cat([a, b], 1), 2),
    "centred": lambda a, b: a - a.mean(1, keepdim=True),
    "concatenated": joined,
}
"""What bounds that drop signs must not take for something else."""


def pairs(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """(K, K) largest norms of gradients of differences of logits found at random points."""
    found = torch.zeros(())
    for scale in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0):
        x = scale * torch.randn(shape, dtype=torch.float64)
        jacobian = logit_jacobian(model, x)
        found = torch.maximum(found, (jacobian[:, None] - jacobian).norm(dim=2))
    return found


def bounds(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """(K, K)."""
    found = margin_bounds(model, shape)
    first = found.of_label(0)
    return torch.stack([first, *map(found.of_label, range(1, len(first)))])


@pytest.mark.parametrize("name", NETWORKS)
def test_never_below_what_is_found(name: str) -> None:
    model, shape = built(name)
    with untouched(model):
        found = bounds(model, shape)
    assert (pairs(model, shape) <= found * ROUNDING).all()
    assert (found <= math.sqrt(2) * lipschitz_bound(model, shape).value * ROUNDING).all()
    torch.testing.assert_close(found, found.mT)
    assert (found.diagonal() == 0).all()


@pytest.mark.parametrize("name", ENDINGS)
def test_dropped_signs_are_no_matter(name: str) -> None:
    torch.manual_seed(0)
    for _ in range(5):
        model = Ending(ENDINGS[name]).double()
        model.right.load_state_dict(model.left.state_dict())  # sums of signs would cancel all
        with torch.no_grad():
            model.right.weight.mul_(-1)
            model.wide.weight[:, 6:] = model.wide.weight[:, :6]
        found, seen = bounds(model, (3,)), pairs(model, (3,))
        assert (seen <= found * ROUNDING).all()


def test_is_exact_where_all_is_linear() -> None:
    """Whatever the layers: a difference of rows, not one of norms."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Linear(8, 5),
    )
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    model.double().eval()
    jacobian = logit_jacobian(model, torch.zeros(2, 4, 4, dtype=torch.float64))
    exact = (jacobian[:, None] - jacobian).norm(dim=2)
    found = bounds(model, (2, 4, 4))
    assert (found >= exact).all()
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)


def test_two_layers_by_hand() -> None:
    """The smaller of ‖t_y − t_k‖·‖W‖ and Σ|t_yi − t_ki|·‖W_i‖, each attained by some pair."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    first, last = model[0].weight.detach(), model[2].weight.detach()
    with torch.no_grad():
        first[0] *= 0.1
        last[1, 1:] = last[0, 1:]  # differs in one small element
    spectral, rows = torch.linalg.matrix_norm(first, 2), first.norm(dim=1)
    found = bounds(model, (4,))
    smaller = []
    for y, k in itertools.combinations(range(3), 2):
        difference = last[y] - last[k]
        by_norm, by_elements = difference.norm() * spectral, difference.abs() @ rows
        torch.testing.assert_close(
            found[y, k], torch.minimum(by_norm, by_elements), rtol=1e-4, atol=0
        )
        smaller.append(bool(by_norm < by_elements))
    assert set(smaller) == {True, False}


@pytest.mark.parametrize("pool", [nn.MaxPool1d(2), lambda a: a.unflatten(1, (2, 2)).amax(2)])
def test_maxima_are_no_linear_maps(pool: Callable[[Tensor], Tensor]) -> None:
    """At a tie the first element, or a mean, is the gradient; elsewhere it is another."""
    model = Smallest(pool)
    with torch.no_grad():
        model.rows.weight.copy_(torch.tensor([[0.0, 0], [8, 0], [0, 0], [0, 6]]))
    assert 10.0 <= bounds(model, (2,))[0, 1] * ROUNDING < 20


class Smallest(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rows, self.pool = nn.Linear(2, 4).double(), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.rows(x))


def test_sharper_than_those_of_all_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10)).double()
    found = margin_bounds(model, (6,))
    assert float(found.of_label(0).mean()) < 0.9 * math.sqrt(2) * found.logits


def test_cancelling_rows_leave_what_rounding_may_have_done() -> None:
    """Equal rows give 0, up to the rounding of what they are made of."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e8, 1.0], [1e8, 1.0], [1.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([[0.1, 0.2, 0.0], [0.2, 0.1, 0.0]]))
    found = float(margin_bounds(model, (2,)).of_label(0)[1])
    assert 0 < found < 1e-4


def test_in_float64_it_is_of_the_float64_copies() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    plain = bounds(model, (3,))
    found: list[Tensor] = []
    in_float64(model, lambda: found.append(bounds(model, (3,))))
    torch.testing.assert_close(found[0], plain, rtol=1e-12, atol=0)
