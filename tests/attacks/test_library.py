"""AutoAttack by its library: the library's own results, and right where the truth is known."""

from __future__ import annotations

import builtins
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.attacks import APGD, FAB, Bounded, Square, robust_accuracy
from flexure.attacks.catalogue import ATTACKS
from flexure.attacks.draws import SampleGenerators
from flexure.contracts import FlexureError, MissingExtraError
from tests.measure.untouched import untouched

NORMS = {"linf": ("Linf", 0.1), "l2": ("L2", 1.2)}
"""Norm -> what the library calls it, and a radius that leaves some samples."""


def convnet(classes: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.AvgPool2d(4), nn.Flatten(),
        nn.Linear(32, classes),
    ).eval()  # fmt: skip


def images(count: int = 40, *, wrong: int = 9) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = convnet()(x).argmax(1)
    y[::wrong] = (y[::wrong] + 1) % 6
    return x, y


def vectors(model: nn.Module, count: int = 30, size: int = 7) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, model(x).argmax(1)


def few_steps(norm: str) -> list:
    """The four attacks of "autoattack", cheap."""
    return [
        APGD(norm, "ce", steps=4),
        APGD(norm, "targeted", steps=4, targets=3),
        FAB(norm, steps=4, targets=3),
        Square(norm, queries=25),
    ]


def every_attack(norm: str, steps: int = 6) -> list:
    return [
        APGD(norm, "ce", steps=steps),
        APGD(norm, "dlr", steps=steps),
        APGD(norm, "targeted", steps=steps),
        FAB(norm, targeted=False, steps=steps),
        FAB(norm, steps=steps),
        Square(norm, queries=15 * steps),
    ]


def directly(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, seed: int, size: int):
    """The library on its own, with the settings of `few_steps`."""
    from pyautoattack import AutoAttack

    names = ["apgd-ce", "apgd-t", "fab-t", "square"]
    whole = AutoAttack(
        model, attacks=names, norm=NORMS[norm][0], eps=eps, seed=seed, version="custom"
    )
    for one in (whole.apgd, whole.apgd_targeted):
        one.n_restarts = 1
        one.n_iter = one.n_iter_orig = 4
        one.n_iter_2 = one.n_iter_min = one.size_decr = 1
    whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = 3
    whole.fab.n_iter, whole.square.n_queries = 4, 25
    return whole.run_standard_evaluation(x, y, batch_size=size)


@pytest.mark.parametrize("norm", NORMS)
def test_the_adversarial_examples_are_those_of_the_library(norm: str) -> None:
    """More samples than a batch: each attack gets full batches of what withstood those before."""
    model, (x, y), eps = convnet(), images(), NORMS[norm][1]
    x_adv, predicted = directly(model, x, y, norm, eps, 5, 16)
    found = robust_accuracy(
        Bounded(model), x, y, attack=few_steps(norm), eps=eps, seed=5, batch_size=16
    )
    assert torch.equal(found.robust, predicted == y)
    assert 0.05 < found.accuracy < found.clean_accuracy - 0.1
    assert found.attacks[0].found
    assert found.attacks[1].attacked > 16
    assert [one.name for one in found.attacks] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    # What the library adds up in float32 is farther from x than eps by a rounding, and is put back.
    torch.testing.assert_close(found.x_adv, x_adv, rtol=0, atol=1e-6)
    other = robust_accuracy(
        Bounded(model), x, y, attack=few_steps(norm)[:1], eps=eps, seed=6, batch_size=16
    )
    assert not torch.equal(other.x_adv, found.x_adv)


@pytest.mark.parametrize("norm", NORMS)
def test_a_single_attack_returns_what_the_library_returns_bit_by_bit(norm: str) -> None:
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    model, (x, y), (name, eps) = convnet(), images(20), NORMS[norm]
    told = {"norm": name, "eps": eps, "seed": 7, "device": "cpu"}
    targets, wide = {"n_target_classes": 5}, {"eps": 4 * eps}
    pairs = [
        (APGD(norm, "ce", 12), APGDAttack(model, n_iter=12, **told)),
        (APGD(norm, "dlr", 12, 2), APGDAttack(model, loss="dlr", n_restarts=2, n_iter=12, **told)),
        (APGD(norm, "targeted", 9), APGDAttack_targeted(model, n_iter=9, **told, **targets)),
        (FAB(norm, False, 9, 2), FABAttack_PT(model, n_restarts=2, n_iter=9, **told)),
        (FAB(norm, True, 9), FABAttack_PT(model, targeted=True, n_iter=9, **told, **targets)),
        (Square(norm, 30), SquareAttack(model, n_queries=30, resc_schedule=False, **told | wide)),
    ]  # fmt: skip
    for attack, own in pairs:
        expected = own.perturb(x.clone(), y)
        for generator in (SampleGenerators((7, 3), torch.arange(20)), generator_of(7)):
            found = attack.run(Bounded(model), x, y, eps=own.eps, generator=generator)
            assert torch.equal(found, expected), attack
        assert not torch.equal(expected, x)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_autoattack_by_name_is_the_standard_version() -> None:
    from pyautoattack import AutoAttack

    for norm, (name, eps) in NORMS.items():
        whole = AutoAttack(convnet(), norm=name, eps=eps, seed=0)
        one, two, three, four = ATTACKS["autoattack"](norm)
        assert whole.attacks_to_run == [each.name for each in (one, two, three, four)]
        assert (one.steps, one.restarts) == (whole.apgd.n_iter, whole.apgd.n_restarts)
        assert (two.steps, two.restarts, two.targets) == (
            whole.apgd_targeted.n_iter,
            whole.apgd_targeted.n_restarts,
            whole.apgd_targeted.n_target_classes,
        )
        assert (three.steps, three.restarts, three.targets) == (
            whole.fab.n_iter,
            1,
            whole.fab.n_target_classes,
        )
        assert (four.queries, four.restarts, four.share) == (
            whole.square.n_queries,
            whole.square.n_restarts,
            whole.square.p_init,
        )
    assert ATTACKS["apgd-ce"]("l2")[0].steps == ATTACKS["pgd"]("l2")[0].steps == 20
    for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"):
        assert [one.name for one in ATTACKS[name]("l2")] == [name]


@pytest.mark.slow
def test_standard_autoattack_is_the_librarys() -> None:
    """With its own settings but for fewer queries, on a network where all four have work."""
    from pyautoattack import AutoAttack

    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(27, 10)), torch.rand(9, 3, 3, 3)
    y = model(x).argmax(1)
    whole = AutoAttack(model, norm="Linf", eps=0.02, seed=2)
    whole.square.n_queries = 40
    x_adv, predicted = whole.run_standard_evaluation(x, y, batch_size=4)
    *others, _ = ATTACKS["autoattack"]("linf")
    attacks = [*others, Square("linf", queries=40)]
    found = robust_accuracy(Bounded(model), x, y, attack=attacks, eps=0.02, seed=2, batch_size=4)
    assert torch.equal(found.robust, predicted == y)
    assert 0 < found.accuracy < 1
    torch.testing.assert_close(found.x_adv, x_adv, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_linear_models_fall_at_the_radius_that_is_known(norm: str) -> None:
    """Two classes, wide bounds: the distance is |m| / ‖w‖ in the dual norm."""
    torch.manual_seed(0)
    model = nn.Linear(7, 2)
    x, y = vectors(model)
    w = (model.weight[1] - model.weight[0]).detach()
    margin = (model(x)[:, 1] - model(x)[:, 0]).detach() * (2 * y - 1)
    distance = margin / (w.norm() if norm == "l2" else w.abs().sum())
    attacks = [each for each in every_attack(norm, 12) if each.name != "square"]
    attacks = [Square(norm, queries=600), *attacks]
    for share in (0.97, 1.03):
        eps = float(distance.sort()[0][15]) * share
        found = robust_accuracy(
            Bounded(model, bounds=(-3, 4)), x, y, attack=attacks, eps=eps, seed=0, every=True
        )
        sure = (distance / eps - 1).abs() > 0.02
        for one in found.attacks[1:]:
            assert torch.equal(one.beaten[sure], (distance < eps)[sure]), one.name
        # Square finds no sample that is beyond reach, and most of the others where it is apt.
        square = found.attacks[0]
        assert not square.beaten[sure & (distance > eps)].any()
        assert square.found >= (0.7 if norm == "linf" else 0.3) * found.attacks[1].found


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(norm: str, classes: int) -> None:
    torch.manual_seed(classes)
    model = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, classes))
    x, y = vectors(model)
    eps = 0.3 if norm == "linf" else 0.9
    found = robust_accuracy(
        Bounded(model), x, y, attack=every_attack(norm), eps=eps, seed=0, every=True
    )
    counts = {one.name: one.found for one in found.attacks}
    assert counts["apgd-ce"]
    assert min(counts["apgd-dlr"], counts["apgd-t"], counts["fab-t"]) >= counts["apgd-ce"] - 1
    told = {one.name: " ".join(one.warnings) for one in found.attacks}
    assert ("difference of logits" in told["apgd-t"]) == (classes < 4)
    assert ("difference of logits" in told["apgd-dlr"]) == (classes < 3)
    assert not told["apgd-ce"] + told["fab-t"] + told["square"]
    by_name = robust_accuracy(
        Bounded(model), x[:3], y[:3], attack=["apgd-t", "fab-t"], norm=norm, eps=eps, seed=0
    )
    assert by_name.accuracy <= float(found.robust[:3].double().mean()) + 0.34


@pytest.mark.parametrize("norm", NORMS)
def test_one_sample_at_a_time(norm: str) -> None:
    model, (x, y), eps = convnet(), images(3), NORMS[norm][1]
    for attack in every_attack(norm):
        for row in range(2):
            x_adv = attack.run(
                Bounded(model), x[row : row + 1], y[row : row + 1], eps=eps,
                generator=generator_of(0),
            )  # fmt: skip
            assert x_adv.shape == (1, 3, 8, 8)
        found = robust_accuracy(Bounded(model), x, y, attack=attack, eps=eps, seed=0, batch_size=1)
        assert len(found) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_given_to_the_model(dtype: torch.dtype) -> None:
    model, (x, y) = convnet().to(dtype), images(10)
    seen = set()
    model.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    for attack in few_steps("linf"):
        found = robust_accuracy(Bounded(model), x.to(dtype), y, attack=attack, eps=0.12, seed=0)
        assert found.x_adv.dtype == dtype
        assert found.accuracy < found.clean_accuracy or attack.name == "square"
    assert seen == {dtype}


def test_other_bounds_are_another_scale() -> None:
    """Bounds (−1, 3), radius 4 eps, a model of the inputs mapped back: the same search."""
    model, (x, y) = convnet(), images(20)

    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model((x + 1) / 4)

    for norm, (_, eps) in NORMS.items():
        for attack in few_steps(norm):
            plain = robust_accuracy(Bounded(model), x, y, attack=attack, eps=eps, seed=0)
            wide = robust_accuracy(
                Bounded(Mapped(), bounds=(-1, 3)), x * 4 - 1, y, attack=attack, eps=4 * eps, seed=0
            )
            assert torch.equal(wide.robust, plain.robust)
            close = ((wide.x_adv + 1) / 4 - plain.x_adv).abs() < 1e-4
            assert close.double().mean() > 0.97  # a rounding may turn the sign of a small gradient


@pytest.mark.parametrize("shape", [(7,), (4, 9), (2, 3, 10), (1, 24, 24), (3, 7, 12), (2, 4, 4, 4)])
def test_square_takes_inputs_of_any_shape(shape: tuple) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3))
    y = model(x).argmax(1)
    for norm, eps in (("linf", 0.7), ("l2", 0.8 * x[0].numel() ** 0.5)):
        attack = Square(norm, queries=40)
        found = robust_accuracy(Bounded(model), x, y, attack=attack, eps=eps, seed=0)
        assert found.accuracy < 1


def test_square_takes_images_of_any_size() -> None:
    for side in (*range(1, 34), 64, 96):
        x = torch.rand(1, 1, side, side)
        model = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 2))
        y = model(x).argmax(1)
        attack, generator = Square("l2", queries=2), generator_of(0)
        assert attack.run(Bounded(model), x, y, eps=1, generator=generator).shape == x.shape


def test_the_default_dtype_may_be_another() -> None:
    (x, y), model = images(8), convnet()
    expected = [robust_accuracy(Bounded(model), x, y, attack=attack, eps=0.1, seed=0)
                for attack in every_attack("linf")]  # fmt: skip
    torch.set_default_dtype(torch.float64)
    try:
        for attack, plain in zip(every_attack("linf"), expected, strict=True):
            found = robust_accuracy(Bounded(model), x, y, attack=attack, eps=0.1, seed=0)
            assert torch.equal(found.x_adv, plain.x_adv)
            assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bounds", [None, (0.0, float("inf"))])
def test_models_without_bounds_are_refused(bounds: tuple | None) -> None:
    model, (x, y) = convnet(), images(4)
    for attack in few_steps("l2"):
        with pytest.raises(FlexureError, match=r"finite bounds .*mean=.*, std=") as error:
            robust_accuracy(Bounded(model, bounds=bounds), x, y, attack=attack, eps=0.1, seed=0)
        assert "PGD" not in str(error.value)


class Logits(nn.Module):
    """An output as of transformers, of a model that overwrites its inputs and hands out its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = convnet()

    def forward(self, x: Tensor) -> object:
        made = self.inner(x.mul_(2) / 2)
        return type("Output", (), {"logits": made})()


def test_inputs_may_be_overwritten_and_outputs_have_logits() -> None:
    (x, y), before = images(10), images(10)[0]
    for attack in every_attack("l2"):
        expected = robust_accuracy(Bounded(convnet()), x, y, attack=attack, eps=1.2, seed=0)
        with untouched(None, x, y):
            found = robust_accuracy(Bounded(Logits()), x, y, attack=attack, eps=1.2, seed=0)
        assert torch.equal(found.x_adv, expected.x_adv)
    assert torch.equal(x, before)

    class Handed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    z = torch.rand(6, 4)
    robust_accuracy(Bounded(Handed()), z, z.argmax(1), attack=Square(queries=9), eps=0.1, seed=0)


def test_nothing_is_left_behind(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    model, (x, y) = convnet(), images(6)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    for attack in every_attack("linf"):
        with untouched(model, x, y):
            attack.run(Bounded(model), x, y, eps=0.05, generator=generator_of(0))
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_models_without_gradients() -> None:
    inner, (x, y) = convnet(), images(10)

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return inner(x.detach())

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return inner((x * 255).round() / 255)

    *gradients, square = every_attack("l2")
    for attack in gradients:
        with pytest.raises(FlexureError, match="Square"):
            robust_accuracy(Bounded(Detached()), x, y, attack=attack, eps=1.2, seed=0)
        found = robust_accuracy(Bounded(Rounded()), x, y, attack=attack, eps=1.2, seed=0)
        assert any("is zero or not finite at" in text for text in found.attacks[0].warnings)
    for model in (Detached(), Rounded()):
        found = robust_accuracy(Bounded(model), x, y, attack=square, eps=4.8, seed=0)
        assert found.accuracy < found.clean_accuracy
        assert not found.attacks[0].warnings


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_are_not_a_number_are_told(norm: str) -> None:
    """No search goes anywhere, and APGD ends in NaN in l2: no sample withstood anything."""
    inner, (x, y) = convnet(), images(10)

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return inner(x) + (0 * x).flatten(1).sum(1, keepdim=True).sqrt()

    eps = 2 * NORMS[norm][1]
    for attack in every_attack(norm, 3)[:-1]:
        found = robust_accuracy(Bounded(Broken()), x, y, attack=attack, eps=eps, seed=0)
        told = " ".join(found.attacks[0].warnings)
        assert "zero or not finite at 8 of 8" in told, attack.name
        dropped = "8 of 8 results of the attack on a batch were not finite" in told
        assert dropped == (norm == "l2" and attack.name.startswith("apgd")), attack.name
        sound = robust_accuracy(Bounded(inner), x, y, attack=attack, eps=eps, seed=0)
        assert not sound.attacks[0].warnings


@pytest.mark.parametrize("norm", NORMS)
def test_outputs_that_never_change(norm: str) -> None:
    """All logits tie: no attack finds anything, none fails."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.reshape(x.shape[0], -1).sum(1, keepdim=True) + torch.zeros(4)

    x, y = torch.rand(5, 3, 6, 6), torch.zeros(5, dtype=torch.long)
    for attack in every_attack(norm):
        found = robust_accuracy(Bounded(Constant()), x, y, attack=attack, eps=0.1, seed=0)
        assert found.accuracy == 1


def test_warnings_of_outputs() -> None:
    (x, y), attack = images(10), APGD("linf", steps=2)
    random = nn.Sequential(convnet(), type("R", (nn.Module,), {"forward": noisy})())
    certain = nn.Sequential(convnet(), nn.Softmax(1))
    saturated = nn.Sequential(convnet(), type("S", (nn.Module,), {"forward": enlarged})())
    for model, text in (
        (random, "random"),
        (certain, "probabilities"),
        (saturated, "not finite"),
    ):
        found = robust_accuracy(Bounded(model), x, y, attack=attack, eps=0.05, seed=0)
        assert any(text in told for told in found.attacks[0].warnings), text
    assert (
        not robust_accuracy(Bounded(convnet()), x, y, attack=attack, eps=0.05, seed=0)
        .attacks[0]
        .warnings
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attack.run(Bounded(certain), x, y, eps=0.05, generator=generator_of(0))
    assert ["probabilities" in str(one.message) for one in caught] == [True]


def noisy(self: nn.Module, z: Tensor) -> Tensor:
    return z + torch.randn_like(z)


def enlarged(self: nn.Module, z: Tensor) -> Tensor:
    return z * 1e5


@pytest.mark.parametrize(("make", "message"), [
    (lambda: APGD("l1"), "norm"),
    (lambda: APGD(loss="hinge"), "loss"),
    (lambda: APGD(steps=0), "steps"),
    (lambda: APGD(restarts=1.0), "restarts"),
    (lambda: FAB(targets=0), "targets"),
    (lambda: FAB(targeted=1), "targeted"),
    (lambda: Square(["l2"]), "norm"),
    (lambda: Square(queries=True), "queries"),
    (lambda: Square(share=0), "share"),
])  # fmt: skip
def test_settings_are_checked(make, message: str) -> None:
    with pytest.raises(FlexureError, match=f"expected {message}"):
        make()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyautoattack"]:
        monkeypatch.delitem(sys.modules, name)
    importing = builtins.__import__

    def missing(name: str, *args, **kwargs):
        if name.partition(".")[0] == "pyautoattack":
            raise ModuleNotFoundError("No module named 'pyautoattack'")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("importlib.import_module", lambda name, package=None: missing(name))
    model, (x, y) = convnet(), images(4)
    for attack in ("autoattack", "square", APGD("linf")):
        with pytest.raises(MissingExtraError, match=r"flexure\[robust\]"):
            robust_accuracy(Bounded(model), x, y, attack=attack, norm="linf", eps=0.1, seed=0)
    assert flexure.robust_accuracy(Bounded(model), x, y, attack="pgd", norm="linf", eps=0.1, seed=0)
