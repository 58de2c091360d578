"""Confidence, likelihood, calibration error and the reliability diagram."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor, nn

from flexure.contracts import DataError, FlexureError
from flexure.measure.calibration import Calibration, calibration
from flexure.measure.over import over
from tests.measure.untouched import untouched
from tests.reference import calibration as reference

IDENTITY = nn.Identity()


def said(confidence: list[float], correct: list[bool]) -> Calibration:
    p = torch.tensor(confidence, dtype=torch.float64)
    right = torch.tensor(correct)
    return Calibration(torch.ones_like(right), p, right, p, right.long(), 1 - p)


def drawn(count: int, classes: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count + classes)
    logits = spread * torch.randn(count, classes, generator=generator)
    return logits, torch.randint(classes, (count,), generator=generator)


def reference_error(found: Calibration, bins: int = 15) -> float:
    return reference.expected_calibration_error(
        found.confidence.tolist(), found.correct.tolist(), bins
    )


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("spread", [1e-3, 3.0, 300.0])
def test_values_are_the_references(classes: int, spread: float):
    logits, y = drawn(50, classes, spread)
    found = calibration(IDENTITY, logits, y)
    for row, label, nll, p, k in zip(
        logits.tolist(), y.tolist(), found.nll, found.confidence, found.predicted, strict=True
    ):
        assert nll == pytest.approx(reference.negative_log_likelihood(row, label), rel=1e-12)
        assert p == pytest.approx(reference.probability(row, int(k)), rel=1e-12)
    assert torch.equal(found.correct, logits.argmax(1) == y)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert found.mean_nll == pytest.approx(float(found.nll.mean()))
    assert found.converged.all()


def test_sure_samples_keep_their_likelihood():
    logits = torch.tensor([[100.0, 0.0, 0.0], [0.0, 100.0, 0.0]])
    found = calibration(IDENTITY, logits, torch.tensor([0, 0]))
    assert found.nll[0] == pytest.approx(2 * math.exp(-100), rel=1e-12)
    assert found.nll[1] == pytest.approx(100.0)
    plain = nn.functional.cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
    assert plain[0] == 0  # what is avoided


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_doubt_of_sure_samples(dtype: torch.dtype):
    """Down to 1e-300, where 1 minus the confidence is 0 from 1e-16 on."""
    tops = [0.0, 1.0, 30.0, 40.0, 300.0, 690.0]
    logits = torch.tensor([[0.25, top, -1.5] for top in tops], dtype=dtype)
    found = calibration(IDENTITY, logits, torch.zeros(6).long())
    for row, doubt in zip(logits.tolist(), found.doubt.tolist(), strict=True):
        with mpmath.workdps(400):
            shares = [mpmath.exp(z) for z in row]
            truth = float(1 - max(shares) / sum(shares))
        assert doubt == pytest.approx(truth, rel=1e-14)
    assert 0 < found.doubt[-1] < 1e-299
    assert found.confidence[3:].tolist() == [1.0] * 3
    torch.testing.assert_close(found.doubt[:3], 1 - found.confidence[:3], rtol=1e-3, atol=0)
    ruled_out = calibration(IDENTITY, torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))
    assert ruled_out.doubt == 0


def test_ruled_out_classes():
    logits = torch.tensor(
        [[0.0, 1.0, -math.inf], [0.0, -math.inf, -math.inf], [0.0, 1.0, -math.inf]]
    )
    found = calibration(IDENTITY, logits, torch.tensor([1, 0, 2]))
    assert found.nll[0] == pytest.approx(math.log1p(math.exp(-1)))
    assert (found.nll[1], found.confidence[1]) == (0, 1)
    assert found.nll[2] == math.inf


def test_ties_go_to_the_first_class():
    found = calibration(IDENTITY, torch.zeros(4, 4), torch.arange(4))
    assert found.predicted.tolist() == [0] * 4
    assert found.accuracy == 0.25
    assert found.confidence.tolist() == [0.25] * 4
    assert found.ece == 0


@given(
    st.lists(st.tuples(st.floats(1e-3, 1.0), st.booleans()), min_size=1, max_size=40),
    st.integers(1, 30),
)
@settings(max_examples=100, deadline=None)
def test_error_and_bins_are_the_references(samples: list[tuple[float, bool]], bins: int):
    found = said(*map(list, zip(*samples, strict=True)))
    told = found.reliability(bins)
    assert sum(b.count for b in told) == len(samples)
    error = sum(b.count * abs(b.accuracy - b.confidence) for b in told) / len(samples)
    assert error == pytest.approx(reference_error(found, bins), abs=1e-12)
    assert all(b.above < b.confidence + 1e-15 and b.confidence <= b.up_to + 1e-15 for b in told)
    assert all(0 <= b.low <= b.accuracy <= b.high <= 1 for b in told)
    assert found.ece == pytest.approx(reference_error(found), abs=1e-12)


def test_a_perfect_and_a_worst_classifier():
    assert said([1.0] * 5, [True] * 5).ece == 0
    assert said([1.0] * 5, [False] * 5).ece == 1
    assert said([0.75] * 4, [True, True, True, False]).ece == 0
    assert said([0.5, 0.5], [True, False]).ece == 0


@pytest.mark.parametrize("numerator", range(1, 16))
def test_ends_of_bins_belong_below(numerator: int):
    """Also those whose quotients are rounded."""
    (only,) = said([numerator / 15], [True]).reliability()
    assert only.up_to == numerator / 15


@pytest.mark.parametrize("classes", [2, 10])
def test_error_is_torchmetrics(classes: int):
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    logits, y = drawn(2000, classes)
    found = calibration(IDENTITY, logits, y)
    theirs = metrics.multiclass_calibration_error(logits.double().softmax(1), y, classes, n_bins=15)
    assert found.ece == pytest.approx(float(theirs), abs=1e-6)  # its bins are of float32


def test_where_torchmetrics_counts_otherwise():
    """Where this fails, torchmetrics has changed, and the docstring of `ece` has to."""
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    for confidence, correct in (
        ([1.0, 1.0, 0.95], [False, True, True]),  # a bin of its own for 1
        ([0.6, 0.62, 0.58], [True, False, True]),  # 9/15 goes up
    ):
        found = said(confidence, correct)
        assert found.ece == pytest.approx(reference_error(found), abs=1e-12)
        theirs = metrics.binary_calibration_error(
            found.confidence, found.correct.long(), n_bins=15, norm="l1"
        )
        assert abs(found.ece - float(theirs)) > 1e-3


def test_reliability_is_scipys():
    found = calibration(IDENTITY, *drawn(500, 10))
    for b in found.reliability():
        inside = (found.confidence > b.above) & (found.confidence <= b.up_to)
        assert b.count == inside.sum()
        assert b.confidence == pytest.approx(float(found.confidence[inside].mean()))
        hits = int(found.correct[inside].sum())
        assert b.accuracy == pytest.approx(hits / b.count)
        truth = binomtest(hits, b.count).proportion_ci(method="wilson")
        assert (b.low, b.high) == pytest.approx((truth.low, truth.high), abs=1e-12)


def test_batches_pool():
    logits, y = drawn(300, 10)
    cut = list(zip(logits.split(70), y.split(70), strict=True))
    found = over(functools.partial(calibration, IDENTITY), cut)
    whole = calibration(IDENTITY, logits, y)
    assert found.result.ece == whole.ece
    parts = [calibration(IDENTITY, *part).ece for part in cut]
    assert abs(sum(parts) / len(parts) - whole.ece) > 1e-3  # a mean of errors is another number
    assert float(found.mean["correct"]) == pytest.approx(whole.accuracy)
    assert float(found.mean["nll"]) == pytest.approx(whole.mean_nll)


def test_nothing_is_changed():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    x, y = torch.randn(6, 4, requires_grad=True), torch.arange(6) % 3
    with untouched(model, x, y):
        first = calibration(model, x, y)
        assert torch.equal(first.nll, calibration(model, x, y).nll)
    with untouched(model, x), pytest.raises(DataError):
        calibration(model, x, y + 1)
    assert not first.nll.requires_grad


def test_models_of_any_kind():
    logits, y = drawn(5, 3)
    given = {"a": logits, "b": torch.zeros(5, 3)}
    by_name = calibration(lambda a, b: SimpleNamespace(logits=a + b), given, y)
    assert torch.equal(by_name.nll, calibration(IDENTITY, logits, y).nll)
    half = calibration(IDENTITY, logits.bfloat16(), y)
    assert torch.equal(half.nll, calibration(IDENTITY, logits.bfloat16().float(), y).nll)


@pytest.mark.parametrize(
    ("logits", "y", "error", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(3).long(), FlexureError, r"shape \(3, 1\)"),
        (torch.zeros(3), torch.zeros(3).long(), FlexureError, "at least two classes"),
        (torch.zeros(3, 2, 4), torch.zeros(3).long(), FlexureError, "at least two classes"),
        (torch.full((3, 2), math.nan), torch.zeros(3).long(), FlexureError, "nan or inf"),
        (torch.full((3, 2), math.inf), torch.zeros(3).long(), FlexureError, "nan or inf"),
        (torch.zeros(3, 2), torch.zeros(3), DataError, r"got torch.float32 of shape \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(2).long(), DataError, r"expected \(3,\) labels"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), DataError, "in 0 to 1, got 0 to 2"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), DataError, "got -1 to 1"),
    ],
)
def test_refusals(logits: Tensor, y: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        calibration(IDENTITY, logits, y)


def test_no_bins_are_refused():
    with pytest.raises(FlexureError, match="at least one bin, got 0"):
        said([0.5], [True]).reliability(0)
