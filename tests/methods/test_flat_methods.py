"""The table of training methods: its grammar, its refusals, and what each row does to a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexure.attacks import Adversarial
from flexure.contracts import FlexureError, SiteError
from flexure.layers.lipschitz_norm import LipschitzBatchNorm
from flexure.methods.flat_methods import METHODS, STANDARD_BETA, FlatMethod, flat_methods
from flexure.models import MLP
from flexure.penalties import CURE, CurvatureRate, GradientNorm, LowCurvature
from flexure.train import SAM
from flexure.units.smooth import CenteredSoftplus, Softplus


def only(name: str, **strengths: float) -> FlatMethod:
    return flat_methods(name, strengths)[0]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(3 * 16, 4), nn.ReLU(), nn.Linear(4, 2),
    ).eval()  # fmt: skip


def changed(name: str, model: nn.Module | None = None) -> nn.Module:
    model = network() if model is None else model
    only(name).change(model, torch.randn(2, 1, 4, 4), residual="sum")
    return model


def kinds(model: nn.Module, *wanted: type[nn.Module]) -> list[int]:
    return [sum(isinstance(m, kind) for m in model.modules()) for kind in wanted]


ALL = (nn.ReLU, Softplus, CenteredSoftplus, LipschitzBatchNorm)
"""What a network is counted by; and `nn.utils.parametrize` for its linear layers."""

EXPECTED: dict[str, tuple[list[int], bool]] = {
    "standard": ([0, 2, 0, 0], False),
    "relu": ([2, 0, 0, 0], False),
    "softplus-wd": ([0, 2, 0, 0], False),
    "lcnn": ([0, 0, 2, 1], True),
    "csoftplus": ([0, 0, 2, 0], False),
    "specnorm": ([0, 2, 0, 0], True),
    "gammabn": ([0, 2, 0, 1], False),
    "csoftplus+specnorm": ([0, 0, 2, 0], True),
    "gradreg": ([0, 2, 0, 0], False),
    "cure": ([0, 2, 0, 0], False),
    "crr": ([0, 2, 0, 0], False),
    "at": ([0, 2, 0, 0], False),
    "sam": ([0, 2, 0, 0], False),
    "relu+gradreg": ([2, 0, 0, 0], False),
    "lcnn+gradreg": ([0, 0, 2, 1], True),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_method_makes_the_layers_that_it_says(name: str) -> None:
    model = changed(name)
    counts, normalised = EXPECTED[name]
    assert kinds(model, *ALL) == counts
    linear = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [nn.utils.parametrize.is_parametrized(m) for m in linear] == [normalised] * 3


def test_every_row_of_the_table_is_tested_above() -> None:
    assert set(METHODS) <= set(EXPECTED)


def test_the_betas_of_the_fixed_softplus_are_the_published_ones() -> None:
    for name, beta in (("standard", STANDARD_BETA), ("at", STANDARD_BETA), ("softplus-wd", 10.0)):
        found = {m.beta for m in changed(name).modules() if isinstance(m, Softplus)}
        assert found == {beta}


def test_smooth_activations_stay_where_no_activation_was_asked_for() -> None:
    def smooth() -> nn.Module:
        return MLP((16, 4, 2), nn.Tanh)

    for name in ("standard", "gradreg", "crr", "at"):
        model = smooth()
        only(name).change(model, torch.randn(2, 16), residual="sum")
        assert kinds(model, nn.Tanh, Softplus) == [1, 0]
    with pytest.raises(SiteError, match="rectifiers to replace"):
        only("softplus-wd").change(smooth(), torch.randn(2, 16), residual="sum")


def test_leaky_and_capped_rectifiers_are_no_relu() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 4), nn.ReLU6())
    only("standard").change(model, torch.randn(2, 3), residual="sum")
    assert kinds(model, nn.LeakyReLU, nn.ReLU6, Softplus) == [1, 1, 0]


def test_the_standard_network_is_the_relu_network_to_rounding() -> None:
    model = network()
    x = torch.randn(5, 1, 4, 4)
    before = model(x)
    torch.testing.assert_close(changed("standard", model)(x), before, atol=2e-3, rtol=0)


PENALTIES: dict[str, dict[object, float]] = {
    "standard": {},
    "gradreg": {GradientNorm(): 6.1e-3},
    "cure": {CURE(): 4.0},
    "crr": {CurvatureRate(): 0.03},
    "specnorm": {},
    "csoftplus": {LowCurvature(1e-2, 0.0): 1.0},
    "gammabn+specnorm": {LowCurvature(0.0, 1e-2): 1.0},
    "lcnn": {LowCurvature(1e-2, 1e-2): 1.0},
    "lcnn+gradreg": {LowCurvature(1e-2, 1e-2): 1.0, GradientNorm(): 6.1e-3},
    "cure+gradreg": {GradientNorm(): 6.1e-3, CURE(): 4.0},
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_have_the_published_weights(name: str) -> None:
    assert only(name).penalties() == PENALTIES[name]


def test_perturbations_and_updates() -> None:
    assert only("at").perturb() == Adversarial(eps=0.1)
    assert only("sam+at", at=0.2).perturb() == Adversarial(eps=0.2)
    assert only("lcnn+sam", sam=0.1).update() == SAM(rho=0.1)
    assert (only("lcnn").perturb(), only("lcnn").update()) == (None, None)


def test_weights_can_be_changed() -> None:
    method = only("lcnn+gradreg", gradreg=0.5, csoftplus=0.25)
    assert method.penalties() == {LowCurvature(0.25, 1e-2): 1.0, GradientNorm(): 0.5}
    assert "0.5" in method.says
    assert "0.25" in method.says


def test_names_are_in_the_table_s_order_and_spaces_do_not_matter() -> None:
    names = [method.name for method in flat_methods(["gradreg + lcnn", "standard"])]
    assert names == ["lcnn+gradreg", "standard"]
    assert "beta 1000" in only("gradreg").says
    assert "beta 1000" not in only("lcnn").says


REFUSALS: dict[str, tuple[list[str], dict[str, float], str]] = {
    "none": ([], {}, "at least one method"),
    "unknown": (["magic"], {}, "'magic'"),
    "unknown part": (["lcnn+magic"], {}, "'magic'"),
    "empty part": (["lcnn+"], {}, "''"),
    "two activations": (["standard+lcnn"], {}, "one part that decides what rectifiers become"),
    "kept and replaced": (["relu+csoftplus"], {}, "relu and csoftplus"),
    "two softplus": (["softplus-wd+standard"], {}, "standard and softplus-wd"),
    "part twice": (["lcnn+specnorm"], {}, "specnorm twice"),
    "method twice": (["lcnn+gradreg", "gradreg+lcnn"], {}, "lcnn\\+gradreg several times"),
    "no number": (["lcnn"], {"standard": 1.0}, "a weight of one of"),
    "idle number": (["lcnn"], {"gradreg": 1.0}, "gradreg"),
    "number 0": (["gradreg"], {"gradreg": 0.0}, "positive and finite"),
    "number nan": (["gradreg"], {"gradreg": float("nan")}, "positive and finite"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_refused(name: str) -> None:
    names, strengths, told = REFUSALS[name]
    with pytest.raises(FlexureError, match=told):
        flat_methods(names, strengths)


def test_a_rectifier_that_cannot_be_reached_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.second = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            return self.second(torch.maximum(h, torch.zeros_like(h)))

    with pytest.raises(SiteError, match="reach every rectifier"):
        only("standard").change(Hidden(), torch.randn(2, 3), residual="sum")
