"""Training on adversarial inputs: what it sees, what it leaves alone, and several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.attacks import PGD, Adversarial, Bounded
from flexure.contracts import FlexureError
from flexure.train import Checkpoint
from tests.attacks import scenarios
from tests.measure.untouched import untouched

ROOT = Path(__file__).parents[2]


def step_of(model: nn.Module, x: Tensor, y: Tensor, **others) -> SimpleNamespace:
    given = {"positions": torch.arange(len(x)), "index": 3, "epoch": 0, "seed": 11} | others
    return SimpleNamespace(model=model, x=x, y=y, **given)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_linear_models_see_the_worst_inputs(norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double().train()
    w = (model.weight[1] - model.weight[0]).detach()
    x, y = torch.randn(8, 5).double(), torch.arange(8) % 2
    attack = PGD(norm, steps=8, step_size=1.5, random_start=False, keep="last")
    found = Adversarial(attack, eps=0.2)(step_of(model, x, y))
    direction = w / w.norm() if norm == "l2" else w.sign()
    torch.testing.assert_close(found, x + 0.2 * direction * (1 - 2 * y)[:, None], atol=1e-7, rtol=0)
    assert not found.requires_grad


def test_the_default_is_the_papers_and_raises_the_loss() -> None:
    perturb = Adversarial()
    assert perturb.attack == PGD(norm="l2", steps=3, keep="last")
    assert perturb.eps == 0.1
    model, (x, y) = scenarios.network(), scenarios.data()
    found = perturb(step_of(model, x, y))
    losses = [nn.functional.cross_entropy(model(z), y, reduction="none") for z in (x, found)]
    assert (losses[1] > losses[0]).float().mean() > 0.95
    assert float((found - x).norm(dim=1).max()) <= 0.1 * (1 + 1e-6)


def test_the_model_is_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(144, 3),
    ).train()
    x, y = torch.rand(6, 2, 8, 8), torch.arange(6) % 3
    model(x).sum().backward()
    with untouched(model, x, y):
        Adversarial(bounds=(0, 1))(step_of(model, x, y))
    with untouched(model, x, y), torch.no_grad():
        Adversarial()(step_of(model, x, y))


@dataclass(frozen=True)
class Backward:
    """An attack that fills the gradients of whatever needs one."""

    norm: str = "linf"

    def run(self, model, x, y, *, eps, generator) -> Tensor:
        at = x.clone().requires_grad_()
        nn.functional.cross_entropy(model(at), y).backward()
        return x + 10 * at.grad.sign()


def test_another_attack_leaves_no_gradients_and_stays_in_the_ball() -> None:
    model, (x, y) = scenarios.network(), scenarios.data()
    with untouched(model, x, y):
        found = Adversarial(Backward(), eps=0.1)(step_of(model, x, y))
    assert float((found - x).abs().max()) <= 0.1 * (1 + 1e-6)


@dataclass(frozen=True)
class Endless:
    norm: str = "l2"

    def run(self, model, x, y, *, eps, generator) -> Tensor:
        return x / 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_half_precision_keeps_to_the_ball(norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 3).to(dtype)
    x, y = torch.rand(6, 20).to(dtype), torch.arange(6) % 3
    for eps in (8 / 255, 0.5):
        perturb = Adversarial(PGD(norm, steps=3, keep="last"), eps=eps, bounds=(0, 0.999))
        change = (perturb(step_of(model, x.clamp(max=0.9), y)) - x.clamp(max=0.9)).double()
        size = change.norm(dim=1) if norm == "l2" else change.abs().amax(1)
        assert float(size.max()) <= eps * (1 + 1e-3)
        assert float(size.min()) > 0.5 * eps


def test_dropout_masks_of_a_step_do_not_depend_on_its_attack() -> None:
    (x, y), model = scenarios.data(), nn.Sequential(nn.Dropout(0.5), scenarios.network()).train()
    for attack in (PGD(steps=3, keep="last"), PGD(steps=5)):
        with untouched(model, x, y):
            Adversarial(attack)(step_of(model, x, y))


def test_batch_statistics_are_those_of_the_attacked_batch() -> None:
    """In the step's mode: a network in train mode is attacked with the batch's own statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    x, y = torch.randn(10, 4) * 5, torch.arange(10) % 3
    in_train = Adversarial(eps=0.5)(step_of(model, x, y))
    in_eval = Adversarial(eps=0.5)(step_of(model.eval(), x, y))
    assert not torch.allclose(in_train, in_eval)


def test_bounds_of_the_model_or_given() -> None:
    (x, y), model = scenarios.data(), scenarios.network()
    low, high = (float(end) for end in x.aminmax())
    for perturb, network in (
        (Adversarial(bounds=(low, high), eps=1.0), model),
        (Adversarial(eps=1.0), Bounded(model, bounds=(low, high))),
    ):
        found = perturb(step_of(network, x, y))
        assert float(found.min()) >= low
        assert float(found.max()) <= high
        assert float((found - x).norm(dim=1).max()) <= 1.0 + 1e-6
    free = Adversarial(eps=1.0)(step_of(model, x, y))
    assert float(free.min()) < low
    with pytest.raises(FlexureError, match="within the bounds"):
        Adversarial(bounds=(0, 1))(step_of(model, x, y))


def test_a_samples_inputs_do_not_depend_on_its_batch() -> None:
    (x, y), model = scenarios.data(), scenarios.network().double()
    x, perturb = x.double(), Adversarial(eps=0.3)
    whole = perturb(step_of(model, x, y))
    assert torch.equal(whole, perturb(step_of(model, x, y)))
    part = slice(20, 31)
    found = perturb(step_of(model, x[part], y[part], positions=torch.arange(45)[part]))
    torch.testing.assert_close(found, whole[part], rtol=0, atol=1e-12)
    for other in ({"index": 4}, {"seed": 12}):
        assert not torch.allclose(perturb(step_of(model, x, y, **other)), whole)


def test_training_is_more_robust_with_it() -> None:
    (x, y) = scenarios.data()
    test = [scenarios.trained(perturb)["model"].eval() for perturb in (None, Adversarial(eps=1.0))]
    plain, trained = (
        flexure.robust_accuracy(
            Bounded(model, bounds=None), x, y, attack="pgd", norm="l2", eps=0.7, seed=0
        )
        for model in test
    )
    assert trained.accuracy > plain.accuracy


def test_an_interrupted_training_ends_as_an_undisturbed_one(tmp_path) -> None:
    calls: list[int] = []

    def stopping(step) -> Tensor:
        calls.append(step.index)
        if step.index == 9 and calls.count(9) == 2:
            raise KeyError
        return step.output.sum() * 0

    def run(**settings) -> dict:
        return scenarios.trained(Adversarial(), penalties={stopping: 1.0}, **settings)

    expected, place = run(), Checkpoint(tmp_path / "run", every=2)
    with pytest.raises(KeyError):
        run(checkpoint=place)
    found = run(checkpoint=place)
    assert calls.count(0) == 2  # the third run went on
    assert found["losses"] == expected["losses"]
    for key, value in expected["model"].state_dict().items():
        assert torch.equal(found["model"].state_dict()[key], value)


def test_two_processes_give_the_weights_of_one(tmp_path) -> None:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.scenarios", str(tmp_path), str(rank)],
            env=environment,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        alone = {name: scenarios.trained(p) for name, p in scenarios.PERTURBATIONS.items()}
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    found = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=False) for rank in range(2)]
    for name, one in alone.items():
        for key, value in one["model"].state_dict().items():
            assert torch.equal(found[0][name]["weights"][key], found[1][name]["weights"][key])
            torch.testing.assert_close(
                found[0][name]["weights"][key], value, atol=1e-5, rtol=0, msg=f"{name} {key}"
            )
        assert found[0][name]["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert alone["l2"]["losses"] != alone["linf"]["losses"]


def test_what_does_not_fit() -> None:
    model, (x, y) = scenarios.network(), scenarios.data()
    with pytest.raises(FlexureError, match="finite radius"):
        Adversarial(eps=-1)
    with pytest.raises(FlexureError, match=r"floating-point tensor, got torch\.int64"):
        Adversarial()(step_of(model, torch.zeros(3, 4).long(), y[:3]))
    with pytest.raises(FlexureError, match="floating-point tensor, got dict"):
        Adversarial()(step_of(model, {"x": x}, y))
    for settings in ({"attack": "pgd"}, {"attack": None}, {"attack": PGD}):
        with pytest.raises(FlexureError, match="an object with norm and run"):
            Adversarial(**settings)
    for bounds in ((1, 0), "ab", 3):
        with pytest.raises(FlexureError, match="lowest and a higher number"):
            Adversarial(bounds=bounds)
    with pytest.raises(FlexureError, match="to return finite inputs"):
        Adversarial(Endless())(step_of(model, x, y))
    assert torch.equal(Adversarial(eps=0.0)(step_of(model, x, y)), x)
    assert replace(Adversarial(), eps=0.2) == Adversarial(eps=0.2)
