"""Training samples in an order that a seed and the epoch decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexure.contracts import DataError
from flexure.methods.samples import read_samples
from flexure.methods.shuffled import Shuffled, joined

X, Y = torch.arange(50).reshape(25, 2).float(), torch.arange(25)
CPU = torch.device("cpu")


def read(batches: list[Any]) -> Any:
    return joined(read_samples(batches, "train", cache_bytes=2**20))


def test_each_epoch_has_every_sample_once_in_another_order() -> None:
    batches = Shuffled(X, Y, 10, seed=1, device=CPU)
    epochs = [list(batches), list(batches)]
    assert [len(y) for _, y in epochs[0]] == [10, 10, 5]
    assert len(batches) == 3
    orders = [torch.cat([y for _, y in epoch]) for epoch in epochs]
    assert all(torch.equal(order.sort().values, Y) for order in orders)
    assert not torch.equal(*orders)
    for x, y in epochs[1]:
        assert torch.equal(x, X[y])


def test_the_order_is_the_seeds_and_resumes_by_its_epoch() -> None:
    def order(seed: int, epoch: int) -> torch.Tensor:
        batches = Shuffled(X, Y, 10, seed=seed, device=CPU)
        batches.set_epoch(epoch)
        return torch.cat([y for _, y in batches])

    batches = Shuffled(X, Y, 10, seed=3, device=CPU)
    for epoch in range(3):
        assert torch.equal(torch.cat([y for _, y in batches]), order(3, epoch))
    assert not torch.equal(order(3, 0), order(4, 0))
    assert not torch.equal(order(3, 1), order(4, 0))


def test_inputs_of_any_form_are_joined_and_shuffled() -> None:
    shared = torch.tensor([[1.0]])
    whole = [
        ({"x": X[i : i + 10], "more": (Y[i : i + 10], shared)}, Y[i : i + 10]) for i in (0, 10)
    ]
    x = read(whole)
    assert torch.equal(x["x"], X[:20])
    for batch, y in Shuffled(x, Y[:20], 7, seed=0, device=CPU):
        assert torch.equal(batch["x"], X[y])
        assert torch.equal(batch["more"][0], y)
        assert torch.equal(batch["more"][1], shared)


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ([X[:5], X[5:10, :1]], "shapes"),
        ([{"a": X[:5]}, {"b": X[5:10]}], "keys"),
        ([(X[:5],), (X[5:10], X[5:10])], "numbers of arguments"),
        ([X[:5], (X[5:10],)], "types"),
        ([(X[:5], 0.1), (X[5:10], 0.2)], "values"),
        ([(X[:5], X[:2]), (X[5:10], X[2:4])], "values"),
    ],
)
def test_what_cannot_be_shuffled_together_is_refused(parts: list[Any], what: str) -> None:
    with pytest.raises(DataError, match=f"{what}.*function of the seed"):
        read([(x, Y[:5]) for x in parts])
