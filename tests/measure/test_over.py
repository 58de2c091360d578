"""Measuring whole data sets: joined values, their statistics, resumption, several processes."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Generator, Tensor, nn

import flexure
from flexure.contracts import DataError, FlexureError
from flexure.measure.over import Summary, over
from flexure.per_sample import PerSample
from tests.measure import over_scenarios as scenarios
from tests.measure.over_scenarios import MEASURE, Noisy, batches

ROOT = Path(__file__).parents[2]


def equal(one: Summary, other: Summary) -> bool:
    a, b = one.result.samples(), other.result.samples()
    same = all(torch.equal(a[name], b[name]) for name in a)
    return a.keys() == b.keys() and same and one.labels == other.labels


@dataclass(frozen=True)
class Values(PerSample):
    value: Tensor


def summary_of(values: list[float] | Tensor, *, labels: int | None = None) -> Summary[Values]:
    given = torch.as_tensor(values)
    return Summary(Values(torch.ones(len(given), dtype=torch.bool), given), labels)


# What is measured


def test_values_of_all_samples_in_order():
    found = over(MEASURE, batches(), seed=3)
    assert len(found) == len(found.result) == 18
    assert found.result.label.tolist() == [i for _, y in batches() for i in y.tolist()]
    assert found.result.scale == 0.5


def test_a_pooled_property_is_that_of_all_samples():
    found = over(MEASURE, batches())
    parts = [over(MEASURE, [batch]).result.root_mean_square for batch in batches()]
    values = found.result.value.double().numpy()
    assert found.result.root_mean_square == pytest.approx(np.sqrt((values**2).mean()), rel=1e-12)
    assert found.result.root_mean_square != pytest.approx(np.mean(parts), rel=1e-3)


def test_randomness_is_the_seeds_and_the_batchs():
    first = over(MEASURE, batches(), seed=3)
    assert equal(first, over(MEASURE, batches(), seed=3))
    assert not torch.equal(first.result.value, over(MEASURE, batches(), seed=4).result.value)
    # What other batches draw does not matter: the second comes out the same behind another first.
    x, y = batches()[0]
    other = over(MEASURE, [(x[:2], y[:2]), *batches()[1:]], seed=3)
    assert torch.equal(other.result.value[2:], first.result.value[4:])
    zeros = [(torch.zeros(4, 3), torch.zeros(4))] * 2
    assert not torch.equal(*over(MEASURE, zeros).result.value.split(4))


def test_nothing_global_is_drawn_from():
    before = torch.get_rng_state()
    over(MEASURE, batches())
    assert torch.equal(before, torch.get_rng_state())


def test_a_measure_without_labels_takes_batches_with_and_without():
    def measure(x: Tensor, *, generator: Generator) -> Values:
        return Values(torch.ones(len(x)) > 0, x.sum(1))

    given = [x for x, _ in batches()]
    forms = [batches(), given, [(x,) for x in given], [[x] for x in given]]
    found = [over(measure, form).result.value for form in forms]
    found.append(over(lambda x, *, generator: measure(x["x"], generator=generator),
                      [{"x": x} for x in given]).result.value)  # fmt: skip
    assert all(torch.equal(each, torch.cat(given).sum(1)) for each in found)
    assert over(measure, given).labels is None


def test_a_measure_that_can_do_without_labels_gets_them_where_there_are_some():
    def measure(model, x: Tensor, y: Tensor | None = None, *, scale=1, generator=None) -> Values:
        return Values(torch.ones(len(x)) > 0, torch.full((len(x),), float(y is not None)))

    bound = functools.partial(measure, nn.Identity())
    assert over(bound, batches()).mean["value"] == 1
    assert over(bound, [x for x, _ in batches()]).mean["value"] == 0
    assert over(bound, [(x, None) for x, _ in batches()]).mean["value"] == 0


def test_only_the_values_stay():
    big: list[Tensor] = []

    def measure(x: Tensor, *, generator: Generator) -> Values:
        wide = torch.zeros(len(x), 1000, requires_grad=True) * 2
        big.append(wide)
        return Values(torch.ones(len(x)) > 0, wide[:, 0])

    kept: dict[int, Values] = {}
    over(measure, batches(), kept=kept)
    for part in kept.values():
        assert not part.value.requires_grad
        assert part.value.untyped_storage().nbytes() == 4 * len(part)


def test_the_librarys_measures_take_their_models_by_partial():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7)).double()
    given = [(x.double(), y) for x, y in batches()]
    x, y = (torch.cat(column) for column in zip(*given, strict=True))
    measured = over(functools.partial(flexure.curvature, model, tol=1e-9), given).result
    whole = flexure.curvature(model, x, y, tol=1e-9)
    torch.testing.assert_close(measured.normalized, whole.normalized, rtol=1e-7, atol=0)
    rates = over(functools.partial(flexure.curvature_rate, model, directions=2), given).result
    assert rates.squares.shape == (18, 4)
    norms = rates.squares.mean(0).log() / 2  # over all samples, before the logarithm
    factors = replace(rates, log_squares=torch.zeros_like(rates.squares)).log_norms
    slope = np.polyfit([1, 2, 3, 4], (norms + factors).numpy(), 1)[0]
    assert rates.rate == pytest.approx(slope, rel=1e-9)


def test_progress_tells_batches():
    told = []
    over(MEASURE, batches(), progress=lambda *step: told.append(step))
    assert told == [("measure", i, 5) for i in range(1, 6)]
    told.clear()
    over(MEASURE, iter(batches()), progress=lambda *step: told.append(step))
    assert told[-1] == ("measure", 5, 5)


# Going on


def test_kept_results_are_not_measured_again():
    kept: dict[int, Noisy] = {}
    whole = over(MEASURE, batches(), seed=3, kept=kept)
    assert sorted(kept) == list(range(5))
    calls = []

    def counted(x: Tensor, y: Tensor, *, generator: Generator) -> Noisy:
        calls.append(len(x))
        return MEASURE(x, y, generator=generator)

    del kept[3]
    assert equal(over(counted, batches(), seed=3, kept=kept), whole)
    assert calls == [7]


def test_what_was_measured_before_an_error_is_kept():
    kept: dict[int, Noisy] = {}

    def stopping(x: Tensor, y: Tensor, *, generator: Generator) -> Noisy:
        if len(x) == 7:
            raise KeyboardInterrupt
        return MEASURE(x, y, generator=generator)

    with pytest.raises(KeyboardInterrupt):
        over(stopping, batches(), seed=3, kept=kept)
    assert sorted(kept) == [0, 1, 2]
    assert equal(over(MEASURE, batches(), seed=3, kept=kept), over(MEASURE, batches(), seed=3))


def test_kept_results_of_other_batches_are_refused():
    kept = {0: over(MEASURE, batches()[3:4]).result}
    with pytest.raises(FlexureError, match="of the kept batch 0, got 7"):
        over(MEASURE, batches(), kept=kept)
    with pytest.raises(FlexureError, match="expected results of one measure, got Noisy, Values"):
        over(MEASURE, batches(), kept={0: summary_of([1.0] * 4).result})
    with pytest.raises(FlexureError, match="same settings"):
        over(MEASURE, batches(), kept={0: replace(over(MEASURE, batches(1)).result, scale=9.0)})


# Refusals


def bare(x: Tensor, *, generator: Generator) -> Values:
    return Values(torch.ones(len(x)) > 0, x.sum(1))


@pytest.mark.parametrize(
    ("measure", "given", "error", "message"),
    [
        (MEASURE, [], DataError, "expected at least one batch, got none"),
        (MEASURE, [torch.ones(2, 3)], DataError, r"expected batches \(x, y\), since the measure"),
        (MEASURE, [(torch.ones(2, 3), None)], DataError, "got batch 0 without"),
        (MEASURE, [(1, 2, 3)], DataError, r"got a tuple of 3 as batch 0"),
        (MEASURE, [object()], DataError, r"got a object as batch 0"),
        (MEASURE, [(torch.ones(0, 3), torch.ones(0))], DataError, "got none in batch 0"),
        (bare, [torch.ones(3, 3), torch.ones(0, 3)], DataError, "got none in batch 1"),
        (bare, [(np.ones((30, 3)),)], DataError, r"got a numpy.ndarray in batch 0; .*as_tensor"),
        (MEASURE, [(torch.ones(2, 3), np.ones(2))], DataError, "got a numpy.ndarray in batch 0"),
        (bare, [({"a": [1.0]},)], DataError, "expected tensors of samples.* got a builtins.dict"),
        (lambda x, y: None, batches(), FlexureError, r"got one with the arguments \(x, y\)"),
        (scenarios.noisy, batches(), FlexureError, "functools.partial"),
        (3, batches(), FlexureError, "whose arguments are known, got 3"),
        (lambda x, *, generator: x, batches(), FlexureError, "PerSample, got Tensor for batch 0"),
        (
            lambda x, *, generator: bare(x[1:], generator=generator),
            batches(),
            FlexureError,
            "values of the 4 samples of batch 0, got 3",
        ),
    ],
)
def test_refusals(measure, given, error, message):
    with pytest.raises(error, match=message):
        over(measure, given)


# Statistics


def test_statistics_are_numpys():
    found = over(MEASURE, batches())
    values = {
        "value": found.result.value.double().numpy(),
        "powers": found.result.powers.double().numpy(),
        "right": found.result.right.double().numpy(),
    }
    assert list(found.mean) == list(values)  # no mean of labels
    for name, v in values.items():
        np.testing.assert_allclose(found.mean[name], v.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.standard_error[name], scipy.stats.sem(v), rtol=1e-12)
        levels = [0.05, 0.25, 0.5, 0.75, 0.95]
        np.testing.assert_allclose(found.quantiles[name], np.quantile(v, levels, 0), rtol=1e-12)
        assert (found.defined[name] == 18).all()
    assert found.converged == pytest.approx((values["value"] > -1).mean())
    assert found.mean["powers"].shape == (3,)
    assert found.mean["value"].shape == ()


def test_nan_is_left_out_and_counted():
    found = summary_of([[1.0, 2.0], [math.nan, 4.0], [3.0, math.nan], [5.0, math.nan]])
    assert found.defined["value"].tolist() == [3, 2]
    assert found.mean["value"].tolist() == [3.0, 3.0]
    assert found.standard_error["value"].tolist() == pytest.approx([2 / 3**0.5, 1.0])
    assert found.quantiles["value"][2].tolist() == [3.0, 3.0]
    nothing = summary_of([math.nan, math.nan])
    assert nothing.defined["value"] == 0
    assert nothing.mean["value"].isnan()
    assert nothing.quantiles["value"].isnan().all()
    assert all(end.isnan() for end in nothing.interval("value"))


def test_infinite_values_count():
    """A likelihood of 0, or a bound that does not exist, is no missing value."""
    found = summary_of([1.0, math.nan, 2.0, 3.0, 4.0, math.inf])
    assert found.defined["value"] == 5
    assert found.mean["value"] == math.inf
    assert found.standard_error["value"].isnan()
    assert all(end.isnan() for end in found.interval("value"))
    assert found.quantiles["value"].tolist() == pytest.approx([1.2, 2, 3, 4, math.inf])
    assert str(found).splitlines()[2].split() == ["value", "inf", "nan", "1.2", *"234", "inf", "5"]
    minus = summary_of([[-math.inf, -math.inf, 1.0], [0.0, math.inf, 1.0], [0.0, 0.0, 1.0]])
    assert minus.mean["value"][0] == -math.inf
    assert minus.mean["value"][1].isnan()
    assert minus.standard_error["value"].tolist()[2] == 0
    assert minus.quantiles["value"][:, 0].tolist() == [-math.inf, -math.inf, 0, 0, 0]


def test_a_likelihood_of_zero_is_in_the_mean():
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    logits[:, 2] = -math.inf
    y = torch.arange(40) % 2
    y[[3, 7]] = 2
    found = over(functools.partial(flexure.calibration, nn.Identity()), [(logits, y)])
    assert found.mean["nll"] == math.inf == found.result.mean_nll
    assert found.defined["nll"] == 40


def test_a_bound_that_does_not_exist_is_in_the_mean():
    def measure(x: Tensor, *, generator: Generator) -> flexure.GradientChange:
        return flexure.gradient_change(
            None, x, field=lambda x: x.square().sum(1), radii=(0.1,), directions=1, points=1
        )

    x = torch.full((9, 1), 0.1, dtype=torch.float64)
    x[0] = 0
    found = over(measure, [x])
    assert found.defined["estimated_bound"] == 8  # with no gradient, there is no change either
    unbounded = found.result.estimated_bound[:, 0].isinf()
    assert 0 < unbounded.sum() < 8  # where noise goes towards the point without a gradient
    assert found.mean["estimated_bound"] == math.inf
    assert found.mean["change"].isfinite()


def test_means_do_not_lose_small_spreads():
    values = torch.tensor([1e8, 1e8 + 1, 1e8 + 2], dtype=torch.float64)
    assert summary_of(values).standard_error["value"] == pytest.approx(1 / 3**0.5, rel=1e-12)
    half = summary_of(torch.tensor([60000.0, 60000.0], dtype=torch.float16))
    assert half.mean["value"] == 60000


def test_intervals_are_scipys():
    found = over(MEASURE, batches())
    values = found.result.value.double().numpy()
    for level in (0.5, 0.95):
        truth = scipy.stats.t.interval(level, 17, values.mean(), scipy.stats.sem(values))
        np.testing.assert_allclose(found.interval("value", level), truth, rtol=1e-12)
    hits = int(found.result.right.sum())
    truth = scipy.stats.binomtest(hits, 18).proportion_ci(method="wilson")
    np.testing.assert_allclose(found.interval("right"), truth, rtol=1e-12)
    assert found.interval("powers")[0].shape == (3,)


def test_an_interval_of_one_sample_is_unknown():
    assert all(end.isnan() for end in summary_of([1.0]).interval("value"))


def test_paired_intervals_are_scipys():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, generator=generator, dtype=torch.float64) * 10
    b = a + 0.1 * torch.randn(30, generator=generator, dtype=torch.float64) - 0.2
    told = summary_of(a).paired(summary_of(b), "value")
    truth = scipy.stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval(0.95)
    np.testing.assert_allclose([told.low, told.high], [truth.low, truth.high], rtol=1e-9)
    assert told.mean == pytest.approx(float((a - b).mean()), rel=1e-12)
    assert told.low > 0  # although the samples differ far more than the models
    a[0], b[1] = math.nan, math.nan
    a[2] = b[2] = math.inf
    told = summary_of(a).paired(summary_of(b), "value")
    assert told.defined == 27
    assert told.mean == pytest.approx(float((a - b)[3:].mean()), rel=1e-12)
    b[2] = 0
    told = summary_of(a).paired(summary_of(b), "value")
    assert (told.defined, told.mean) == (28, math.inf)
    assert told.low.isnan()


def test_paired_shares_differ_by_one_at_most():
    right, wrong = torch.tensor([True, True, True, False]), torch.zeros(4, dtype=torch.bool)
    told = summary_of(right).paired(summary_of(wrong), "value")
    assert told.mean == 0.75
    assert told.high == 1.0
    assert -1.0 <= float(told.low) < 0.75


def test_paired_shares_have_a_width_where_nothing_differs():
    right = torch.arange(20) % 3 > 0
    told = summary_of(right).paired(summary_of(right.clone()), "value")
    assert told.mean == told.standard_error == 0
    assert -0.3 < told.low < 0 < told.high < 0.3
    changed = right.clone()
    changed[0] = ~changed[0]
    assert summary_of(changed).paired(summary_of(right), "value").mean == pytest.approx(0.05)


def test_pairs_of_several_values():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 9, 3, generator=generator)
    for one, other in ((a, b), (a > 0, b > 0)):
        told = summary_of(one).paired(summary_of(other), "value")
        for k in range(3):
            alone = summary_of(one[:, k]).paired(summary_of(other[:, k]), "value")
            for name in ("mean", "standard_error", "low", "high", "defined"):
                assert float(getattr(told, name)[k]) == pytest.approx(float(getattr(alone, name)))


def test_pairs_must_be_of_one_measurement():
    there = over(MEASURE, batches())
    other = over(functools.partial(scenarios.noisy, 2.0), batches())
    with pytest.raises(FlexureError, match=r"same settings, got \{'scale': 0.5\} and"):
        there.paired(other, "value")


def test_pairs_must_be_of_the_same_samples():
    with pytest.raises(DataError, match="got 2 and 3 of them"):
        summary_of([1.0, 2.0]).paired(summary_of([1.0, 2.0, 3.0]), "value")
    given = batches()
    there = over(MEASURE, given)
    with pytest.raises(DataError, match="got other labels"):
        there.paired(over(MEASURE, given[::-1]), "value")
    x, y = (torch.cat(column) for column in zip(*given, strict=True))
    in_one = over(MEASURE, [(x, y)])
    assert there.paired(in_one, "value").defined == 18  # how they are cut does not matter


def test_unknown_fields_and_levels_are_refused():
    found = over(MEASURE, batches())
    for name in ("label", "nonsense", "scale", "converged"):
        with pytest.raises(
            FlexureError, match=f"one of the fields value, powers, right, got '{name}'"
        ):
            found.interval(name)
    for level in (0, 1, 95):
        with pytest.raises(FlexureError, match="a level between 0 and 1"):
            found.paired(found, "value", level)


def test_it_prints_as_a_table():
    values = [[1.0, 2.0], [math.nan, 4.0]]
    lines = str(summary_of(values)).splitlines()
    assert lines[0] == "Values: 2 samples, 100 % converged"
    head = ["mean", "s.e.", *(f"{n} %" for n in (5, 25, 50, 75, 95)), "defined"]
    assert lines[1].split() == " ".join(head).split(" ")
    assert lines[2].split() == ["value[0]", "1", "nan", "1", "1", "1", "1", "1", "1"]
    assert lines[3].split() == ["value[1]", "3", "1", "2.1", "2.5", "3", "3.5", "3.9", "2"]
    assert len({len(line) for line in lines[1:]}) == 1


# Several processes


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.measure.over_scenarios", str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank), "2"], env=environment, cwd=ROOT) for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_give_the_bits_of_one(found):
    alone = over(MEASURE, batches(), seed=3)
    for each in found:
        assert equal(each["all"], alone)
        assert equal(each["iterator"], alone)
        assert equal(each["few"], over(MEASURE, batches(1)))
    assert [each["told"] for each in found] == [[("measure", i, 5) for i in range(1, 6)], []]


def test_each_process_keeps_its_own_batches(found):
    assert found[0]["kept"] == ([0, 2, 4], [2], True)
    assert found[1]["kept"] == ([1, 3], [7], True)


def test_an_error_of_one_process_ends_both(found):
    assert found[1]["failing"] == "ValueError: boom after 1"
    assert "Error: expected all 2 processes to go on" in found[0]["failing"]
    assert "process 1: ValueError: boom" in found[0]["failing"]
    assert found[0]["failing"].endswith("after 1")  # not at the end of the data
    assert all("DataError: expected at least one batch" in each["empty"] for each in found)


def test_results_that_cannot_be_sent_end_both(found):
    assert all("ocal" in each["unpicklable"] for each in found), found[0]["unpicklable"]


@pytest.mark.parametrize("name", ["sharded", "other last"])
def test_other_batches_on_other_processes_are_refused(found, name: str):
    for each in found:
        assert "DataError: expected the same batches on all 2 processes" in each[name]


@pytest.mark.parametrize("name", ["shorter", "much shorter", "none on one"])
def test_fewer_batches_on_one_process_are_refused(found, name: str):
    for each in found:
        assert "expected" in each[name]
        assert "the same" in each[name]
