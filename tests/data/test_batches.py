"""Seeded stratified splits, views, and batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexure.contracts import DataError, FlexureError, LabelledData
from flexure.data import (
    ArrayData,
    LazyData,
    Subset,
    batches,
    load_data,
    only_classes,
    split,
    stratified_split,
)


def numbered(count: int, classes: int = 2) -> ArrayData:
    """Sample i is the vector (i,), of class i mod `classes`."""
    items = torch.arange(count, dtype=torch.float32)[:, None]
    return ArrayData(items, torch.arange(count) % classes, tuple(map(str, range(classes))))


def numbers(data: LabelledData) -> list[int]:
    return [int(data[i]) for i in range(len(data))]


def identity(x: Tensor) -> Tensor:
    return x


# stratified_split


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(12, 60), min_size=2, max_size=6),
    cut=st.floats(0.2, 0.8),
    seed=st.integers(0, 2**32),
)
def test_fractions_are_disjoint_exhaustive_and_proportional(counts, cut, seed) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    parts = stratified_split(labels, [cut, 1.0 - cut], seed=seed)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(labels)))
    assert len(parts[0]) == round(cut * len(labels))
    shares = torch.tensor(counts) * len(parts[0]) / len(labels)
    assert ((labels[parts[0]].bincount() - shares).abs() <= 1).all()


def test_counts_are_exact_and_may_leave_samples_out() -> None:
    labels = torch.arange(100) % 4
    parts = stratified_split(labels, [41, 17, 8], seed=0)
    assert [len(p) for p in parts] == [41, 17, 8]
    assert len(set(torch.cat(parts).tolist())) == 66
    for part in parts:
        per_class = labels[part].bincount(minlength=4)
        assert per_class.max() - per_class.min() <= 1


def test_seed_decides_alone() -> None:
    labels = torch.arange(50) % 2
    state = torch.random.get_rng_state()
    first = stratified_split(labels, [0.5, 0.5], seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(7)
    again = stratified_split(labels, [0.5, 0.5], seed=3)
    other = stratified_split(labels, [0.5, 0.5], seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_every_sample_can_land_in_every_part() -> None:
    labels = torch.arange(20) % 2
    hits = torch.zeros(20)
    for seed in range(400):
        hits[stratified_split(labels, [0.25, 0.75], seed=seed)[0]] += 1
    # Binomial with mean 100 and standard deviation 8.7.
    assert hits.min() > 60
    assert hits.max() < 140


@pytest.mark.parametrize(
    "sizes",
    [[], [0.5, 0.6], [0.0, 1.0], [-0.1, 0.5], [11], [5, 6], [0, 3], [1, 0.5], [float("nan")]],
)
def test_sizes_that_do_not_fit(sizes) -> None:
    with pytest.raises(DataError, match="sum to at most"):
        stratified_split(torch.arange(10) % 2, sizes, seed=0)


@pytest.mark.parametrize("sizes", [[0.2, 0.8], [0.8, 0.2]])
def test_small_class_reaches_both_ends(sizes) -> None:
    labels = torch.tensor([0] * 20 + [1] * 3)
    parts = stratified_split(labels, sizes, seed=0)
    assert sorted(int(labels[part].sum()) for part in parts) == [1, 2]


def test_class_missing_from_a_part() -> None:
    labels = torch.tensor([0] * 30 + [1])
    with pytest.raises(DataError, match=r"none of class 1 \(1 samples in all"):
        stratified_split(labels, [0.8, 0.2], seed=0)
    with pytest.raises(DataError, match="in part 1 of 0 samples"):
        stratified_split(torch.arange(10) % 2, [0.96, 0.04], seed=0)


def test_negative_seed() -> None:
    with pytest.raises(FlexureError, match="seed of at least 0"):
        stratified_split(torch.arange(10) % 2, [0.5], seed=-1)


# split


def test_missing_splits_are_held_out_test_first() -> None:
    data = numbered(1000, 5)
    parts = split({"train": data}, seed=42)
    assert (len(parts.train), len(parts.val), len(parts.test)) == (640, 160, 200)
    together = numbers(parts.train) + numbers(parts.val) + numbers(parts.test)
    assert sorted(together) == list(range(1000))
    for part in (parts.train, parts.val, parts.test):
        assert part.labels.bincount().unique().numel() == 1
        assert part.labels.tolist() == [i % 5 for i in numbers(part)]
    # The test samples are those of a plain fifth: whether there is a validation split is no matter.
    (test, _) = stratified_split(data.labels, [0.2, 0.8], seed=42)
    assert numbers(parts.test) == test.tolist()
    with_val = split({"train": data, "validation": numbered(10)}, seed=42)
    assert numbers(with_val.test) == numbers(parts.test)


def test_own_splits_are_kept() -> None:
    source = {"train": numbered(100), "validation": numbered(30), "test": numbered(20)}
    parts = split(source, seed=0)
    assert parts.train is source["train"]
    assert parts.val is source["validation"]
    assert parts.test is source["test"]
    only_test = split({"train": numbered(100), "test": source["test"]}, seed=0)
    assert (len(only_test.train), len(only_test.val), len(only_test.test)) == (80, 20, 20)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"test": 200}, (640, 160, 200)),
        ({"train": 100, "val": 50, "test": 300}, (100, 50, 300)),
        ({"test": 0.5, "val": 0.5}, (250, 250, 500)),
        ({"train": 0.5}, (320, 160, 200)),
        ({"val": 100}, (700, 100, 200)),
    ],
)
def test_requested_sizes(sizes, expected) -> None:
    parts = split({"train": numbered(1000, 5)}, seed=1, sizes=sizes)
    assert (len(parts.train), len(parts.val), len(parts.test)) == expected
    together = numbers(parts.train) + numbers(parts.val) + numbers(parts.test)
    assert len(set(together)) == len(together)


def test_requested_sizes_of_own_splits() -> None:
    source = {"train": numbered(100), "test": numbered(40)}
    parts = split(source, seed=1, sizes={"test": 10, "val": 20})
    assert (len(parts.train), len(parts.val), len(parts.test)) == (80, 20, 10)
    assert parts.test.data is source["test"]


def test_impossible_requests() -> None:
    source = {"train": numbered(100), "test": numbered(40)}
    for sizes in ({"test": 41}, {"val": 100}, {"val": 1.0}, {"train": 81}):
        with pytest.raises(DataError):
            split(source, seed=0, sizes=sizes)
    with pytest.raises(DataError, match="validation"):
        split(source, seed=0, sizes={"validation": 3})


def test_digits_split_is_stratified() -> None:
    parts = split(load_data("sklearn:digits"), seed=42)
    whole = load_data("sklearn:digits")["train"].labels.bincount() / 1797
    for part in (parts.train, parts.val, parts.test):
        assert (part.labels.bincount() / len(part) - whole).abs().max() < 0.006


# Subset, only_classes


def test_subset_is_a_view() -> None:
    data = numbered(10, 5)
    view = Subset(Subset(data, torch.tensor([9, 3, 4])), torch.tensor([2, 0]))
    assert isinstance(view, LabelledData)
    assert numbers(view) == [4, 9]
    assert view.labels.tolist() == [4, 4]
    assert view.classes == data.classes
    with pytest.raises(IndexError):
        view[2]


def test_only_classes_renumbers() -> None:
    data = numbered(10, 5)
    view = only_classes(data, [4, 2])
    assert numbers(view) == [2, 4, 7, 9]
    assert view.labels.tolist() == [1, 0, 1, 0]
    assert view.classes == ("4", "2")
    for wrong in ([5], [1, 1], [-1]):
        with pytest.raises(DataError, match="distinct classes"):
            only_classes(data, wrong)
    with pytest.raises(DataError, match="use only_classes"):
        Subset(data, torch.arange(10), keep=(0, 1))


# batches


def test_batches_in_order() -> None:
    made = batches(numbered(7), preprocess=lambda x: 2 * x, batch_size=3)
    assert len(made) == 3
    for _ in range(2):
        got = list(made)
        assert [len(y) for _, y in got] == [3, 3, 1]
        assert torch.cat([x for x, _ in got]).flatten().tolist() == [2.0 * i for i in range(7)]
        assert torch.cat([y for _, y in got]).tolist() == [i % 2 for i in range(7)]


def epochs(count: int, **options) -> list[list[int]]:
    made = batches(numbered(30), preprocess=identity, batch_size=4, shuffle=True, **options)
    orders = []
    for _ in range(count):
        got = list(made)
        x = torch.cat([x for x, _ in got]).flatten().long()
        assert torch.equal(torch.cat([y for _, y in got]), x % 2)
        orders.append(x.tolist())
    return orders


@pytest.mark.parametrize("cache", [False, True])
def test_shuffle_depends_on_seed_and_epoch(cache: bool) -> None:
    state = torch.random.get_rng_state()
    first = epochs(3, seed=5, cache=cache)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == epochs(3, seed=5)
    assert all(sorted(order) == list(range(30)) for order in first)
    # No two epochs alike, nor an epoch of one seed like another epoch of the next seed.
    both = first + epochs(3, seed=6)
    assert len({tuple(order) for order in both}) == 6


def test_epoch_can_be_set_to_resume() -> None:
    made = batches(numbered(30), preprocess=identity, batch_size=30, shuffle=True, seed=5)
    made.epoch = 2
    ((x, _),) = made
    assert x.flatten().tolist() == epochs(3, seed=5)[2]
    assert made.epoch == 3


def test_running_epochs_do_not_disturb_each_other() -> None:
    made = batches(numbered(30), preprocess=identity, batch_size=30, shuffle=True, seed=5)
    first, second = iter(made), iter(made)
    later, earlier = next(second)[0], next(first)[0]
    expected = epochs(2, seed=5)
    assert earlier.flatten().tolist() == expected[0]
    assert later.flatten().tolist() == expected[1]


def test_cache_preprocesses_once() -> None:
    calls = []

    def count(x: Tensor) -> Tensor:
        calls.append(1)
        return x

    made = batches(numbered(10), preprocess=count, batch_size=4, cache=True)
    assert not calls
    first, second = list(made), list(made)
    assert len(calls) == 10
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


def test_device() -> None:
    for cache in (False, True):
        made = batches(numbered(5), preprocess=identity, batch_size=5, device="meta", cache=cache)
        ((x, y),) = made
        assert x.device.type == y.device.type == "meta"


def test_different_shapes_name_the_sample() -> None:
    data = LazyData(lambda i: torch.zeros(3 + (i == 2)), torch.arange(4) % 2, ("a", "b"))
    with pytest.raises(DataError, match=r"\(3,\) as before, got \(4,\) at sample 2"):
        list(batches(data, preprocess=identity, batch_size=4))
    with pytest.raises(DataError, match="a tensor, got list"):
        list(batches(data, preprocess=lambda x: x.tolist(), batch_size=4))


def test_wrong_requests() -> None:
    with pytest.raises(FlexureError, match="at least 1"):
        batches(numbered(4), preprocess=identity, batch_size=0)
    with pytest.raises(FlexureError, match="pass seed="):
        batches(numbered(4), preprocess=identity, batch_size=1, shuffle=True)
    with pytest.raises(DataError, match="got none"):
        batches(numbered(0), preprocess=identity, batch_size=1)
