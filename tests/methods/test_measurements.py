"""Measuring one model or two: what is run, what is refused, how two compare, and resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

import flexure
from flexure.contracts import BudgetError, DataError, FlexureError
from flexure.measure.intervals import wilson_interval
from flexure.measure.over import Summary
from flexure.methods.measured_store import MeasuredStore
from flexure.methods.measurements import Measurements, compared, measure_model
from flexure.methods.measures import BOUND, MEASURES
from flexure.methods.paired import (
    LEVEL,
    MEAN,
    MEDIAN,
    POOLED,
    SHARE,
    QuantityDifference,
    QuantityEstimate,
)
from flexure.record import to_json
from tests.measure.untouched import untouched

CLASSES = 3


@pytest.fixture(autouse=True, scope="module")
def _few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexure.methods.paired._RESAMPLES", 200)
        yield


def network(activation: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 8), activation, nn.Linear(8, 8), activation, nn.Linear(8, CLASSES)
    ).eval()


def data(batches: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 4, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


SMALL: dict[str, Any] = {"directions": 2, "radii": (0.01, 0.1)}


@pytest.fixture(scope="module")
def pair(_few_resamples: None) -> Measurements:
    """Two smooth networks on 24 samples."""
    return measure_model(
        network(nn.Tanh()),
        data(),
        against=network(nn.Softplus(5)),
        names=("one", "other"),
        rate_samples=20,
        **SMALL,
    )


@pytest.mark.parametrize("measure", [*MEASURES, BOUND])
def test_every_measure_runs_and_leaves_the_models_alone(measure: str) -> None:
    model, other, batches = network(nn.Tanh()), network(nn.Softplus(5)), data()
    tensors = [tensor for batch in batches for tensor in batch]
    with untouched(model, *tensors), untouched(other):
        found = measure_model(model, batches, against=other, measures=[measure], **SMALL)
    assert not found.models[0].refusals
    if measure != BOUND:
        assert set(found.models[0].summaries) == {measure}
        assert len(found.models[0].summaries[measure]) == 24
        assert found.differences_of(measure) == found.differences != ()


@pytest.mark.parametrize("measure", MEASURES)
def test_every_result_comes_back_from_disk_as_it_was(measure: str, tmp_path: Path) -> None:
    found = measure_model(network(nn.Tanh()), data(), measures=[measure], **SMALL)
    result = found.models[0].summaries[measure].result
    kept = MeasuredStore(tmp_path, {}).of(0, measure, type(result))
    kept[3] = result
    again = kept[3]
    assert type(again) is type(result)
    assert again.settings() == result.settings()
    assert again.samples().keys() == result.samples().keys()
    for name, values in result.samples().items():
        assert again.samples()[name].dtype == values.dtype
        assert torch.equal(again.samples()[name].nan_to_num(7), values.nan_to_num(7))
    assert (list(kept), 3 in kept, 4 in kept) == ([3], True, False)
    del kept[3]
    assert not len(kept)


def test_a_relu_network_says_what_it_does_not_have() -> None:
    found = measure_model(network(nn.ReLU()), data(), **SMALL)
    (model,) = found.models
    assert set(model.refusals) == {"rate", BOUND}
    assert model.rate is None
    assert model.bound is None
    assert model.looseness is None
    assert model.curvature is not None
    for reason in model.refusals.values():
        assert "steer" in reason
        assert "\n" not in reason
    assert all(any(reason in note for note in found.notes) for reason in model.refusals.values())
    assert found.differences == ()


def test_what_one_model_lacks_is_left_out_of_the_comparison() -> None:
    found = measure_model(network(nn.Tanh()), data(), against=network(nn.ReLU()), **SMALL)
    assert found.differences_of("rate") == ()
    assert found.differences_of("curvature") != ()
    row = next(row for row in found.rows() if row.label == "curvature rate")
    assert row.estimates[0] is not None
    assert row.estimates[1:] == (None,)
    assert row.difference is None


def test_a_model_compared_with_itself_does_not_differ() -> None:
    """Both see the same samples and the same random draws."""
    model = network(nn.Tanh())
    found = measure_model(model, data(), against=network(nn.Tanh()), **SMALL)
    assert len(found.differences) >= 10
    for one in found.differences:
        assert one.value == one.neutral, one
        assert one.low <= one.neutral <= one.high or not one.has_interval
        assert not one.certain


def test_means_and_ratios_are_those_of_the_samples(pair: Measurements) -> None:
    first, second = (model.curvature.result.normalized.double() for model in pair.models)
    rows = {(d.quantity, d.statistic): d for d in pair.differences_of("curvature")}
    mean, median = rows["normalized", "mean"], rows["normalized", "median"]
    differences = first - second
    assert mean.value == pytest.approx(float(differences.mean()), rel=1e-12)
    half = 2.0686576 * float(differences.std()) / math.sqrt(24)  # t with 23 degrees of freedom
    assert (mean.low, mean.high) == pytest.approx((mean.value - half, mean.value + half), rel=1e-6)
    ratios = (first / second).sort().values
    assert median.value == pytest.approx(float(ratios.quantile(0.5)), rel=1e-12)
    # The textbook's table of the sign test: n = 24 has k = 7.
    assert (median.low, median.high) == (float(ratios[6]), float(ratios[17]))
    assert (mean.samples, median.samples) == (24, 24)
    assert median.is_ratio
    assert not mean.is_ratio


def test_the_medians_interval_covers_as_often_as_it_says() -> None:
    """Exactly, from the binomial distribution, and no smaller interval would."""
    for n in (6, 7, 24, 25, 101):
        found = MEDIAN.of(Summary(_values(torch.arange(1.0, n + 1))), "x", 0)[0]
        k = int(found.low)
        assert found.high == n + 1 - k
        assert 1 - 2 * binom.cdf(k - 1, n, 0.5) >= 0.95
        assert 1 - 2 * binom.cdf(k, n, 0.5) < 0.95
    few = MEDIAN.of(Summary(_values(torch.arange(1.0, 6))), "x", 0)[0]
    assert few == (3.0, -math.inf, math.inf, 5)


def test_pairs_without_a_ratio_are_left_out() -> None:
    ones = Summary(_values(torch.tensor([0.0, 0.0, 3.0, 1.0, math.nan])))
    others = Summary(_values(torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0])))
    assert MEDIAN.between(ones, others, "x", 0)[0] == (1.0, -math.inf, math.inf, 3)
    assert MEAN.between(ones, others, "x", 0)[0].samples == 4


def test_the_rates_difference_is_of_pooled_slopes_with_an_interval(pair: Measurements) -> None:
    """Against the delta method: the influence of each sample on the difference of slopes."""
    first, second = (model.rate.result for model in pair.models)
    (found,) = pair.differences_of("rate")
    assert found.value == pytest.approx(first.rate - second.rate, rel=1e-12)
    assert found.samples == 20
    orders = torch.tensor(first.orders, dtype=torch.float64)
    weights = (orders - orders.mean()) / (orders - orders.mean()).square().sum()
    shares = [result.squares / result.squares.mean(0) for result in (first, second)]
    influence = (shares[0] - shares[1]) @ weights / 2
    error = float(influence.std()) / math.sqrt(20)
    assert found.low < found.value < found.high
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.35)


def test_the_bootstrap_of_a_mean_is_its_normal_interval() -> None:
    torch.manual_seed(3)
    values = torch.randn(400, dtype=torch.float64)
    found = POOLED.of(Summary(_values(values)), "mean", 0)[0]
    half = 1.96 * float(values.std()) / 20
    assert found.value == pytest.approx(float(values.mean()), rel=1e-12)
    ends = (float(values.mean()) - half, float(values.mean()) + half)
    assert (found.low, found.high) == pytest.approx(ends, abs=0.15 * half)


def test_the_calibration_error_has_no_interval(pair: Measurements) -> None:
    (row,) = [row for row in pair.rows() if "calibration error" in row.label]
    assert row.label == "expected calibration error, plug-in"
    results = [model.calibration.result for model in pair.models]
    assert [one.value for one in row.estimates] == [result.ece for result in results]
    assert row.difference.value == results[0].ece - results[1].ece
    for one in (*row.estimates, row.difference):
        assert not one.has_interval
        assert "[" not in str(one)
    assert str(row.difference)[0] in "+-"
    assert not row.difference.certain


def test_shares_are_of_the_samples_that_have_a_value() -> None:
    nan = math.nan
    ones = Summary(_values(torch.tensor([0.0, 0.5, nan, 1.0, 0.0, 0.0])))
    others = Summary(_values(torch.tensor([1.0, 0.5, 1.0, nan, 0.0, 1.0])))
    (found,) = SHARE.of(ones, "x", 0)
    low, high = wilson_interval(torch.tensor(2), torch.tensor(5), level=LEVEL)
    assert found == (0.4, float(low), float(high), 5)
    (paired,) = SHARE.between(ones, others, "x", 0)
    assert (paired.value, paired.samples) == (-0.5, 4)  # −1, 0, 0, −1
    half = 2.5705818 * math.sqrt((2 + 2 - 1 / 6 * 2**2) / 5 / 6)  # with +1 and −1: t of 5
    assert (paired.low, paired.high) == pytest.approx((-1 / 3 - half, -1 / 3 + half), rel=1e-6)
    same = SHARE.between(ones, ones, "x", 0)[0]
    assert same.low < same.value == 0 < same.high


def test_what_is_no_number_is_told_in_words() -> None:
    inf, nan = math.inf, math.nan
    ratio = QuantityDifference("m", "q", "median", inf, inf, inf, 9, None, "q")
    assert str(ratio) == "infinite ratios at half of the samples or more"
    assert (
        str(QuantityDifference("m", "q", "median", 2, 1, inf, 9, None, "q")) == "times 2 [1, inf]"
    )
    assert str(QuantityEstimate("m", "q", "mean", nan, nan, nan, 0, None, "q")) == "not defined"
    assert str(QuantityEstimate("m", "q", "mean", 2.0, nan, nan, 1, None, "q")) == "2"
    assert str(QuantityEstimate("m", "q", "median", 2.0, -inf, inf, 5, None, "q")) == "2"


def test_radii_are_told_apart(pair: Measurements) -> None:
    changes = [one for one in pair.models[0].estimates if one.quantity == "change"]
    assert [one.at for one in changes] == [0.01, 0.1]
    compared = [one.at for one in pair.differences_of("gradient_change")]
    assert compared == [0.01, 0.1] * 3
    mean = pair.models[0].gradient_change.mean["change"]
    assert [one.value for one in changes] == mean.tolist()


def test_the_bound_and_what_exceeds_it_are_beside_the_change() -> None:
    found = measure_model(
        network(nn.Tanh()), data(), measures=["gradient_change"], radii=(0.01, 10**-0.5)
    )
    assert [row.label for row in found.rows()] == [
        "relative gradient change, noise of 0.01 input units",
        "its estimated bound, noise of 0.01 input units, median",
        "share of samples above that bound, noise of 0.01 input units",
        "relative gradient change, noise of 0.316 input units",
        "its estimated bound, noise of 0.316 input units, median",
        "share of samples above that bound, noise of 0.316 input units",
    ]
    result = found.models[0].gradient_change.result
    told = {(one.quantity, one.at): one for one in found.models[0].estimates}
    bounds = result.estimated_bound[:, 1].double().sort().values
    median = told["estimated_bound", result.radii[1]]
    assert median.value == pytest.approx(float(bounds.quantile(0.5)), rel=1e-12)
    share = told["violations", result.radii[1]]
    assert share.value == float((result.violations[:, 1] > 0).double().mean())
    assert 0 <= share.low <= share.value < share.high <= 1


def test_the_bound_holds_and_its_looseness_is_told(pair: Measurements) -> None:
    for model in pair.models:
        largest = float(model.curvature.result.hessian_norm.max())
        assert model.looseness == pytest.approx(model.bound.cross_entropy / largest, rel=1e-6)
        assert model.looseness > 1


def test_costly_measures_take_the_first_samples(pair: Measurements) -> None:
    model = pair.models[0]
    assert (len(model.rate), len(model.curvature), model.samples) == (20, 24, 24)
    assert any(note.startswith("rate: the first 20 of 24") for note in pair.notes)
    whole = measure_model(
        network(nn.Tanh()), data(), measures=["rate"], rate_samples=None, **SMALL
    ).models[0]
    # Of the same batches the same values, whatever the limit.
    assert torch.equal(whole.rate.result.squares[:16], model.rate.result.squares[:16])


def test_the_table_and_the_file_have_everything(pair: Measurements) -> None:
    text = str(pair)
    for one in (*pair.models[0].estimates, *pair.models[1].estimates, *pair.differences):
        assert str(one) in text
        assert one.label in text
    assert "one" in text.splitlines()[1]
    found = json.loads(json.dumps(to_json(pair)))
    assert len(found["models"][0]["summaries"]["curvature"]["result"]["normalized"]) == 24
    assert found["models"][0]["bound"]["cross_entropy"] == pair.models[0].bound.cross_entropy
    assert len(found["differences"]) == len(pair.differences)


def test_two_separate_measurements_compare_like_one(pair: Measurements) -> None:
    settings = {"rate_samples": 20, **SMALL}
    models = [
        measure_model(network(activation), data(), **settings).models[0]
        for activation in (nn.Tanh(), nn.Softplus(5))
    ]
    assert compared(*models) == pair.differences
    fewer = measure_model(network(nn.Tanh()), data(2), **settings).models[0]
    with pytest.raises(FlexureError, match="on the same samples, got 24 and 16"):
        compared(models[0], fewer)


class Interrupting(nn.Module):
    """Passes on what it gets, and is interrupted at its n-th call."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at = at
        self.last = [0]  # measures put attributes back, but not what is in them

    @property
    def calls(self) -> int:
        return self.last[0]

    def forward(self, x: Tensor) -> Tensor:
        self.last[0] += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return x

    def extra_repr(self) -> str:
        return ""


def values_of(found: Measurements) -> Iterator[tuple[str, Tensor]]:
    for model in found.models:
        for measure, summary in model.summaries.items():
            for name, values in summary.result.samples().items():
                yield f"{model.name} {measure} {name}", values


def test_interrupted_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    def run(watch: Interrupting, **more: Any) -> Measurements:
        first = nn.Sequential(watch, network(nn.Tanh()))
        return measure_model(
            first, data(), against=network(nn.Softplus(5)), rate_samples=20, **SMALL, **more
        )

    undisturbed = Interrupting()
    whole = run(undisturbed)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupting(at=undisturbed.calls // 2), store=tmp_path)
    there = len(list(tmp_path.glob("*.safetensors")))
    assert 0 < there < 24
    resumed = Interrupting()
    found = run(resumed, store=tmp_path)
    assert 0 < resumed.calls < undisturbed.calls
    for (name, one), (_, other) in zip(values_of(whole), values_of(found), strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), name
    assert found.differences == whole.differences
    assert [m.estimates for m in found.models] == [m.estimates for m in whole.models]
    again = Interrupting()
    run(again, store=tmp_path)
    assert again.calls < resumed.calls


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 7}, "seed"),
    "tolerance": ({"tol": 0.5}, "tol"),
    "products": ({"max_products": 3}, "max_products"),
    "limit": ({"rate_samples": 3}, "limits"),
    "data": ({"batches": data(2)}, "data"),
    "model": ({"model": network(nn.Tanh(), seed=5)}, "model"),
    "dial": ({"beta": 0.8000001}, "model"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_batches_of_another_measurement_are_refused(name: str, tmp_path: Path) -> None:
    def run(
        *, model: nn.Module | None = None, batches: Any = None, beta: float = 0.8, **more: Any
    ) -> None:
        relu = network(nn.ReLU()) if model is None else model
        if model is None:
            flexure.steer(relu, beta=beta, example=torch.zeros(2, 4))
        settings = {"measures": ["calibration"], "store": tmp_path, **more}
        measure_model(relu, batches or data(), **settings)

    run()
    run(measures=["calibration", "curvature"])  # more measures are no other measurement
    changed, named = CHANGES[name]
    with pytest.raises(FlexureError, match=f"batches of this measurement, got .* {named}"):
        run(**changed)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown measure": ({"measures": ["curvature", "beauty"]}, "curvature, rate"),
    "measures as text": ({"measures": "curvature"}, "curvature, rate"),
    "no measure": ({"measures": []}, "curvature, rate"),
    "equal names": ({"names": ("a", "a")}, "two different names"),
    "no samples": ({"rate_samples": 0}, "at least 1"),
    "half a sample": ({"curvature_samples": 1.5}, "whole number"),
    "seed": ({"seed": -1}, "seed"),
    "radii": ({"radii": (-1.0,)}, "radi"),
    "radii that fall": ({"radii": (0.1, 10**-2.5)}, r"got 0.1, 0.00316; .* 0.01, 0.0316, 0.1$"),
    "radii as text": ({"radii": "ab"}, "radi"),
    "no product": ({"max_products": 0}, "max_products"),
    "orders": ({"orders": (2,)}, "order"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused(name: str) -> None:
    settings, match = MISTAKES[name]
    with pytest.raises(FlexureError, match=match):
        measure_model(network(nn.Tanh()), data(1), **(SMALL | settings))


def test_wrong_data_end_the_measurement() -> None:
    with pytest.raises(DataError):
        measure_model(network(nn.Tanh()), [])
    x, y = data(1)[0]
    with pytest.raises(DataError, match=r"from 0 to 2, .* got 3 to 5, 8 of 8 above"):
        measure_model(network(nn.Tanh()), [(x, y + CLASSES)], **SMALL)


def test_a_wrong_label_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    batches = data()
    batches[-1][1][-1] = CLASSES
    watch = Interrupting()
    with pytest.raises(DataError, match="1 of 24"):
        measure_model(nn.Sequential(watch, network(nn.Tanh())), batches, store=tmp_path, **SMALL)
    assert watch.calls == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("measure", ["curvature", "gradient_change"])
def test_memory_that_nothing_fits_is_an_error(measure: str) -> None:
    model = network(nn.Tanh())
    with pytest.raises(BudgetError, match=r"of at least .* got 64; raise it") as error:
        measure_model(model, data(1), measures=[measure, "calibration"], memory=64, **SMALL)
    assert "check=" not in str(error.value)
    found = measure_model(model, data(1), measures=[measure], memory=10**9, **SMALL)
    assert not found.models[0].refusals


def test_a_model_that_nothing_fits_is_an_error() -> None:
    with pytest.raises(FlexureError, match=r"^model has no rate and no bound: .*steer") as error:
        measure_model(network(nn.ReLU()), data(1), measures=["rate", BOUND], **SMALL)
    assert str(error.value).count("expected") == 1


def test_products_are_those_asked_for() -> None:
    asked = {"measures": ["curvature", "gradient_change"], **SMALL}
    one = measure_model(network(nn.Tanh()), data(1), max_products=1, **asked)
    assert one.settings["max_products"] == 1
    assert int(one.models[0].curvature.result.products.max()) == 1
    assert not one.models[0].gradient_change.result.converged.any()
    assert len([note for note in one.notes if "raise max_products (--max-products)" in note]) == 2
    every = measure_model(network(nn.Tanh()), data(1), **asked)
    assert every.models[0].gradient_change.result.converged.all()


def test_progress_tells_samples() -> None:
    told: list[tuple[str, int, int]] = []
    measure_model(
        network(nn.Tanh()),
        data(),
        measures=["calibration"],
        progress=lambda *step: told.append(step),
    )
    assert told == [("model: calibration", n, 24) for n in (8, 16, 24)]


def _values(x: Tensor) -> Any:
    from dataclasses import dataclass

    from flexure.per_sample import PerSample

    @dataclass(frozen=True)
    class Values(PerSample):
        x: Tensor

        @property
        def mean(self) -> float:
            return float(self.x.mean())

    return Values(torch.ones(len(x), dtype=torch.bool), x)
