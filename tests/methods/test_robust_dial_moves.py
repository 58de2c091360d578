"""Groups of sites, and the searches over their dials."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import flexure
from flexure.contracts import FlexureError
from flexure.methods.robust_dial_groups import TOP_LEVEL, site_groups
from flexure.methods.robust_dial_moves import LOWEST_BETA, SEARCHES, Point

START: Point = (0.7, 0.7, 0.7, 0.5, 0.5, 0.5)
BEST = (0.8, 0.55, 0.72, 0.4, 0.6, 0.5)


def peak(point: Point) -> float:
    return -sum((a - b) ** 2 for a, b in zip(point, BEST, strict=True))


def run(
    name: str, score: Callable[[Point], float], budget: int, seed: int = 0
) -> list[tuple[float, Point]]:
    moves = SEARCHES[name](START, score(START), seed)
    tried = []
    try:
        point = next(moves)
        while len(tried) < budget:
            tried.append((score(point), point))
            point = moves.send(tried[-1][0])
    except StopIteration:
        pass
    return tried


def test_layers_of_a_residual_network() -> None:
    with pytest.warns(UserWarning, match="random weights"):
        model = flexure.load_model("flexure:resnet20").model
    names = [site.name for site in flexure.sites(model, torch.zeros(2, 3, 32, 32)).sites]
    groups = site_groups(names, "layers")
    sizes = {TOP_LEVEL: 1, "layer1": 6, "layer2": 6, "layer3": 6}
    assert {name: len(sites) for name, sites in groups.items()} == sizes
    assert [site for sites in groups.values() for site in sites] == names
    assert site_groups(names, "sites") == {name: (name,) for name in names}


def test_calls_of_functions_belong_to_their_caller() -> None:
    names = [":0", "relu:1", "layer1.0:0", "features.3", "act"]
    assert site_groups(names, "layers") == {
        TOP_LEVEL: (":0", "act"),
        "relu": ("relu:1",),
        "layer1": ("layer1.0:0",),
        "features": ("features.3",),
    }


def test_the_first_pattern_counts() -> None:
    names = ["a.0", "a.1", "b.0"]
    groups = site_groups(names, {"zero": ["*.0"], "a": "a.*"})
    assert groups == {"zero": ("a.0", "b.0"), "a": ("a.1",)}
    with pytest.raises(FlexureError, match="every site in a group"):
        site_groups(names, {"a": "a.*"})
    with pytest.raises(FlexureError, match="in every group"):
        site_groups(names, {"all": "*", "none": "c.*"})
    with pytest.raises(FlexureError, match="groups"):
        site_groups(names, {})


@pytest.mark.parametrize(
    ("name", "budget", "near"), [("coordinate", 400, 0.03), ("evolutionary", 600, 0.04)]
)
def test_searches_find_a_peak(name: str, budget: int, near: float) -> None:
    _, point = max(run(name, peak, budget))
    assert max(abs(a - b) for a, b in zip(point, BEST, strict=True)) <= near


def test_greedy_takes_the_best_of_each_group_once() -> None:
    tried = run("greedy", peak, 10_000)
    assert len(tried) == 3 * (7 * 3 - 1)
    _, point = max(tried)
    assert point == pytest.approx((0.8, 0.55, 0.7, 0.4, 0.6, 0.5))


def test_coordinate_ends_where_nothing_helps() -> None:
    assert len(run("coordinate", lambda point: -float(point != START), 10_000)) == 3 * 2 * 6


@pytest.mark.parametrize("name", list(SEARCHES))
def test_points_stay_in_range_and_are_told_in_few_digits(name: str) -> None:
    tried = run(name, lambda point: -sum(point), 300)
    for _, point in tried:
        assert all(LOWEST_BETA <= beta <= 1 for beta in point[:3])
        assert all(0 <= c <= 1 for c in point[3:])
        assert all(value == round(value, 4) for value in point)
        assert name != "evolutionary" or point != START
    assert max(tried) > (-sum(START), START)


def test_only_evolution_draws_and_by_its_seed() -> None:
    first, again, other = (run("evolutionary", peak, 25, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert run("coordinate", peak, 25, 0) == run("coordinate", peak, 25, 1)
