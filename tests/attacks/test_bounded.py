"""Models of inputs within bounds: the same numbers, the same model, and what may be done to it."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import flexure
from flexure.attacks.bounded import Bounded, check_within, limits_of
from flexure.contracts import FlexureError
from flexure.models.preprocess import CIFAR


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).eval()


def test_pixels_in_are_what_preprocessing_gives() -> None:
    torch.manual_seed(0)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    bounded = Bounded(nn.Identity(), mean=CIFAR.mean, std=CIFAR.std)
    assert torch.equal(bounded(image[None] / 255)[0], CIFAR(image))


def test_vectors_and_no_normalisation() -> None:
    x = torch.rand(5, 2)
    bounded = Bounded(nn.Identity(), mean=torch.tensor([1.0, 2.0]), std=(0.5, 4.0), bounds=None)
    torch.testing.assert_close(bounded(x), (x - torch.tensor([1.0, 2.0])) / torch.tensor([0.5, 4]))
    plain = Bounded(nn.Identity(), bounds=(-1, 1))
    assert plain(x) is x
    assert plain.bounds == (-1.0, 1.0)
    assert plain.state_dict() == {}


def test_it_refers_to_the_model() -> None:
    model = convolutional()
    bounded = Bounded(model, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert bounded.model is model
    assert not bounded.training
    assert [id(p) for p in bounded.parameters()] == [id(p) for p in model.parameters()]
    bounded.train()
    assert model.training
    x = torch.rand(2, 3, 8, 8)
    before = bounded.eval()(x)
    with torch.no_grad():
        model[4].bias += 1
    torch.testing.assert_close(bounded(x), before + 1)
    assert Bounded(model.double(), mean=(0.5,) * 3, std=(0.2,) * 3).mean.dtype == torch.float64


def test_copies_pickles_and_state_dicts() -> None:
    model = convolutional()
    bounded = Bounded(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), bounds=(0, 255))
    x = torch.rand(2, 3, 8, 8)
    file = io.BytesIO()
    torch.save(bounded, file)
    file.seek(0)
    for other in (
        copy.deepcopy(bounded),
        pickle.loads(pickle.dumps(bounded)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), bounded(x))
        assert other.bounds == (0.0, 255.0)
        assert other.model is not model
    fresh = Bounded(convolutional(), mean=(0.0,) * 3, std=(1.0,) * 3)
    fresh.load_state_dict(bounded.state_dict())
    assert torch.equal(fresh(x), bounded(x))
    assert set(bounded.state_dict()) == {"mean", "std"} | {
        f"model.{key}" for key in model.state_dict()
    }
    assert "bounds=(0.0, 255.0), mean=[" in repr(bounded)


def test_steering_inside_and_around_are_the_same() -> None:
    x = torch.rand(2, 3, 8, 8)
    inside, around = convolutional(), convolutional()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
    bounded = Bounded(inside, mean=mean, std=std)
    flexure.steer(inside, beta=0.5, example=x)
    outer = Bounded(around, mean=mean, std=std)
    steering = flexure.steer(outer, beta=0.5, example=x)
    assert torch.equal(bounded(x), outer(x))
    steering.remove()
    plain = Bounded(convolutional(), mean=mean, std=std)
    assert torch.equal(outer(x), plain(x))
    assert not torch.equal(bounded(x), plain(x))


def test_bounds_and_jets_follow_the_chain_rule() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double().eval()
    bounded = Bounded(model, mean=(0.5,) * 3, std=(0.25,) * 3)
    inner, outer = (flexure.hessian_bound(m, (3,)) for m in (model, bounded))
    assert outer.vector == pytest.approx(16 * inner.vector, rel=1e-9)
    assert outer.lipschitz == pytest.approx(4 * inner.lipschitz, rel=1e-9)
    x, v = torch.rand(2, 3).double(), torch.randn(2, 3).double()
    one, other = (
        flexure.jet(lambda x, m=m: m(x)[:, 0], at, v, order=3)
        for m, at in ((model, (x - 0.5) * 4), (bounded, x))
    )
    scale = 4.0 ** torch.arange(4).double()[:, None]
    torch.testing.assert_close(other, one * scale)
    measured = [flexure.curvature(m, at) for m, at in ((model, (x - 0.5) * 4), (bounded, x))]
    torch.testing.assert_close(measured[1].gradient_norm, 4 * measured[0].gradient_norm)


def test_limits() -> None:
    def of(bounds) -> tuple[float, float]:
        return limits_of(Bounded(nn.Identity(), bounds=bounds), torch.float64)

    assert limits_of(nn.Identity(), torch.float64) == of(None) == (-math.inf, math.inf)
    assert of((0, math.inf)) == (0.0, math.inf)
    check_within(torch.tensor([[0.0, 1.0]]), (0.0, 1.0))
    for bad in (1.0000001, -1e-9, math.nan):
        with pytest.raises(FlexureError, match="within the bounds"):
            check_within(torch.tensor([[0.5, bad]]), (0.0, 1.0))
    with pytest.raises(FlexureError, match="within the bounds"):
        check_within(torch.tensor([[math.inf]]), (-math.inf, math.inf))
    model = nn.Identity()
    model.bounds = "wide"
    with pytest.raises(FlexureError, match="lowest and a higher number"):
        limits_of(model, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("high", [0.1, 0.3, 0.7, 0.9])
def test_inputs_on_bounds_that_no_dtype_holds_are_within(dtype: torch.dtype, high: float) -> None:
    limits = limits_of(Bounded(nn.Identity(), bounds=(-high, high)), dtype)
    on = torch.tensor([[-high, high]], dtype=dtype)
    check_within(on, limits)
    with pytest.raises(FlexureError, match="within the bounds"):
        check_within(torch.nextafter(on, 2 * on), limits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5,)}, "or neither"),
        ({"mean": (0.5,), "std": (1.0, 1.0)}, "or neither"),
        ({"mean": (0.5,), "std": (0.0,)}, "above 0"),
        ({"mean": (math.nan,), "std": (1.0,)}, "finite means"),
        ({"mean": "ab", "std": "cd"}, "sequences of numbers"),
        ({"mean": 0.5, "std": "cd"}, "sequences of numbers"),
        ({"bounds": "01"}, "lowest and a higher"),
        ({"bounds": (1, 0)}, "lowest and a higher"),
        ({"bounds": (0, 1, 2)}, "lowest and a higher"),
        ({"bounds": (0, math.nan)}, "lowest and a higher"),
    ],
)
def test_settings_that_do_not_fit(settings, message: str) -> None:
    with pytest.raises(FlexureError, match=message):
        Bounded(nn.Identity(), **settings)


def test_inputs_of_other_channels() -> None:
    bounded = Bounded(nn.Identity(), mean=(0.5,) * 3, std=(1.0,) * 3)
    for shape in ((2, 1, 4, 4), (3,)):
        with pytest.raises(FlexureError, match=r"expected inputs \(B, 3, \.\.\.\)"):
            bounded(torch.rand(shape))
