"""Adaptations: what is trained, what stays, switching, and the way back, for every method."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexure
from flexure.contracts import FlexureError, SiteError
from flexure.methods.adapt import adapt
from flexure.methods.baselines import FullFinetune, LinearProbe, SteeredProbe
from flexure.methods.catalogue import METHODS
from flexure.methods.steer import steer
from flexure.methods.trainable_ct import TrainableCT
from flexure.units import CTU
from tests.methods.adapted import (
    Net,
    batch,
    contents,
    method,
    net,
    put,
    same,
    state,
    train,
)

EVERY = pytest.mark.parametrize("name", METHODS)
FROZEN = pytest.mark.parametrize("name", [n for n, row in METHODS.items() if row.freezes])
X, Y = batch()


@pytest.fixture
def model() -> Net:
    return net()


class TestTraining:
    @FROZEN
    def test_frozen_means_bit_identical_weights_and_buffers(self, name: str, model: Net) -> None:
        before = contents(model)
        adaptation = put(model, name, classes=3)
        train(adaptation, steps=20, rate=0.05)
        now = contents(model)
        kept = [key for key in before if key in now and not key.startswith("head")]
        assert len(kept) == len(before) - 2 or name == "lora"
        assert all(torch.equal(before[key], now[key]) for key in kept)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(
            adaptation.trainable
        )
        x = torch.cat([X, X])
        model.train()
        assert torch.equal(model(x)[:8], model(x)[8:])  # no dropout, no batch statistics
        adaptation.remove()
        assert same(contents(model), before)

    @EVERY
    def test_something_is_learned(self, name: str, model: Net) -> None:
        adaptation = put(model, name, classes=3)
        first = F.cross_entropy(model(X), Y)
        train(adaptation, steps=30, rate=0.05)
        assert F.cross_entropy(model.eval()(X), Y) < 0.9 * first
        learned = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert learned == set(adaptation.trainable)

    def test_full_finetuning_trains_in_train_mode(self, model: Net) -> None:
        before = contents(model)
        adaptation = adapt(model, FullFinetune(), example=X)
        train(adaptation)
        assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
        assert not torch.equal(model(X), model(X))
        model.eval()
        adaptation.remove()
        assert same(contents(model), before)
        assert not model.norm.training

    @EVERY
    def test_groups_for_any_optimiser(self, name: str, model: Net) -> None:
        adaptation = put(model, name, classes=5)
        groups = adaptation.parameter_groups(head_learning_rate=0.5)
        assert groups[-1]["name"] == "head"
        assert groups[-1]["lr"] == 0.5
        assert [group["lr"] for group in groups[:-1]] == (
            [adaptation.method.learning_rate] if adaptation.count else []
        )
        numbers = [p.numel() for group in groups for p in group["params"]]
        head = 5 * 6 + 5
        assert sum(numbers) == adaptation.count + head
        named = dict(model.named_parameters())
        assert sum(named[n].numel() for n in adaptation.trainable) == adaptation.count + head
        assert all(named[n].requires_grad for n in adaptation.trainable)

    @EVERY
    def test_same_seed_same_head(self, name: str, model: Net) -> None:
        weights = []
        for index, seed in enumerate((1, 1, 2)):
            state_before = torch.get_rng_state()
            adaptation = put(model, name, classes=4, seed=seed, name=str(index))
            assert torch.equal(torch.get_rng_state(), state_before)
            weights.append(model.head.weight.clone())
            adaptation.remove()
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    @EVERY
    def test_the_own_head_is_trained_where_no_classes_are_given(
        self, name: str, model: Net
    ) -> None:
        head, before = model.head, model.head.weight.clone()
        with torch.no_grad():
            plain = model(X)
        adaptation = put(model, name)
        assert torch.equal(model.head.weight, before)
        if adaptation.count == 0 and name != "steered_probe":
            assert torch.equal(model(X), plain)
        train(adaptation)
        assert not torch.equal(model.head.weight, before)
        adaptation.remove()
        assert model.head is head
        assert torch.equal(model.head.weight, before)

    def test_a_frozen_model_is_unfrozen_for_training(self, model: Net) -> None:
        model.requires_grad_(False)
        before = state(model)
        for row in (LinearProbe(), FullFinetune()):
            adaptation = adapt(model, row, example=X)
            named = dict(model.named_parameters())
            assert all(named[name].requires_grad for name in adaptation.trainable)
            train(adaptation)
            adaptation.remove()
            model.eval()
            assert state(model) == before

    def test_it_prints_its_share(self, model: Net, capsys: pytest.CaptureFixture[str]) -> None:
        adaptation = adapt(model, TrainableCT(), example=X, classes=2)
        # conv 76, norm 8, middle 148, slope 4, last 102, head 14, and 2·(4+2+4+4+6)
        line = "trainable: 40 + 14 head of 392 parameters (13.78 %)"
        assert capsys.readouterr().out == line + "\n"
        assert line in repr(adaptation)
        assert "in place" in repr(adaptation)
        adaptation.disable()
        assert "disabled" in str(adaptation)
        assert capsys.readouterr().out == ""


class TestSwitching:
    @EVERY
    @pytest.mark.parametrize("mode", [True, False])
    def test_the_way_back_is_exact(self, name: str, mode: bool, model: Net) -> None:
        model.train(mode)
        model.norm.eval()
        model.register_forward_hook(lambda *args: None)
        model.act.register_forward_hook(lambda *args: None)
        model.head.register_forward_pre_hook(lambda *args: None)
        model.middle.weight.requires_grad_(False)
        model.conv.weight.grad = torch.ones_like(model.conv.weight)
        before = state(model)
        adaptation = put(model, name, classes=4)
        assert all(parameter.grad is None for parameter in model.parameters())
        if adaptation.method.freezes:  # the mode of everything is the caller's otherwise
            train(adaptation)
        adaptation.disable()
        assert state(model) == before
        adaptation.enable()
        assert state(model) != before
        adaptation.remove()
        assert state(model) == before
        adaptation.remove()
        assert state(model) == before
        with pytest.raises(FlexureError, match="was removed"):
            adaptation.enable()

    @EVERY
    def test_what_was_learned_comes_back(self, name: str, model: Net) -> None:
        with torch.no_grad():
            plain = model(X)
        adaptation = put(model, name, classes=4)
        train(adaptation, rate=0.1)
        objects = {id(p) for group in adaptation.parameter_groups() for p in group["params"]}
        trained = model.eval()(X)
        with adaptation.disable() as inside:
            assert inside is adaptation
            assert not adaptation.active
            assert torch.equal(model.eval()(X), plain)
        assert adaptation.active
        assert torch.equal(model.eval()(X), trained)
        assert objects == {id(p) for g in adaptation.parameter_groups() for p in g["params"]}
        train(adaptation)
        assert not torch.equal(model.eval()(X), trained)

    def test_several_by_name(self, model: Net) -> None:
        plain, before = model(X), state(model)
        made, outputs = {}, {}
        for name in METHODS:
            made[name] = put(model, name, classes=4, name=name)
            train(made[name], rate=0.1)
            outputs[name] = model.eval()(X)
        for name, adaptation in made.items():
            adaptation.enable()
            assert [a.active for a in made.values()] == [a is adaptation for a in made.values()]
            assert torch.equal(model.eval()(X), outputs[name])
        with made["linear_probe"].enable(), made["trainable_ct"].enable():
            assert torch.equal(model.eval()(X), outputs["trainable_ct"])
        assert made[name].active
        made[name].disable()
        assert torch.equal(model.eval()(X), plain)
        assert state(model) == before
        with made["lora"].enable():
            assert made["lora"].active
        assert state(model) == before
        with pytest.raises(FlexureError, match="'lora', which an adaptation of this model has"):
            adapt(model, LinearProbe(), example=X, name="lora")
        made["lora"].remove()
        adapt(model, LinearProbe(), example=X, name="lora").remove()

    def test_disabling_one_that_is_not_in_place_does_nothing(self, model: Net) -> None:
        one = adapt(model, LinearProbe(), example=X, name="one")
        two = adapt(model, TrainableCT(), example=X, name="two")
        with one.disable():
            assert two.active
        assert two.active
        one.remove()
        assert two.active

    @EVERY
    def test_dtype_and_device_follow_the_model(self, name: str, model: Net) -> None:
        adaptation = put(model, name, classes=4)
        train(adaptation)
        adaptation.disable()
        model.eval().double()
        with torch.no_grad():
            plain = model(X.double())
            adaptation.enable()
            assert model(X.double()).dtype == torch.float64
            adaptation.disable()
            assert torch.equal(model(X.double()), plain)

    def test_registry_keeps_no_model_alive(self) -> None:
        model = net()
        gone = weakref.ref(model)
        adaptation = adapt(model, TrainableCT(), example=X)
        adaptation.disable()
        del model, adaptation
        gc.collect()
        assert gone() is None

    def test_a_dropped_handle_is_found_in_place(self, model: Net) -> None:
        before = state(model)
        adapt(model, TrainableCT(), example=X, name="dropped")
        gc.collect()
        adapt(model, LinearProbe(), example=X).remove()
        assert state(model) == before


class TestKept:
    """A model keeps its adaptations."""

    def test_what_was_learned_outlives_the_handle(self, model: Net) -> None:
        attributes = set(model.__dict__)
        first = adapt(model, TrainableCT(), example=X, name="a")
        train(first, rate=0.1)
        learned = model.eval()(X)
        assert flexure.adaptations(model) == {"a": first}
        del first
        adapt(model, LinearProbe(), example=X, name="b")
        gc.collect()
        assert list(flexure.adaptations(model)) == ["a", "b"]
        with pytest.raises(FlexureError, match="new name"):
            adapt(model, LinearProbe(), example=X, name="a")
        flexure.adaptations(model)["a"].enable()
        assert torch.equal(model(X), learned)
        for name, adaptation in flexure.adaptations(model).items():
            assert adaptation.name == name
            adaptation.remove()
            assert name not in flexure.adaptations(model)
        assert set(model.__dict__) == attributes

    @pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle"])
    def test_copies_have_none(self, how: str, model: Net) -> None:
        adaptation = adapt(model, TrainableCT(), example=X)
        adaptation.disable()
        if how == "pickle":
            assert "_Held" not in str(pickle.dumps(model))
            twin = pickle.loads(pickle.dumps(model))
        else:
            twin = getattr(copy, how)(model)
        assert flexure.adaptations(twin) == {}
        other = adapt(twin, TrainableCT(), example=X)
        assert flexure.adaptations(twin) == {"default": other}
        assert flexure.adaptations(model) == {"default": adaptation}
        other.remove()
        assert flexure.adaptations(model) == {"default": adaptation}

    def test_handles_say_what_to_do_instead_of_pickling(self, model: Net) -> None:
        adaptation = adapt(model, TrainableCT(), example=X)
        for call in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(FlexureError, match=r"save\(\)"):
                call(adaptation)

    def test_of_wrapped_models(self, model: Net) -> None:
        adaptation = adapt(nn.DataParallel(model), TrainableCT(), example=X)
        assert flexure.adaptations(nn.DataParallel(model)) == {"default": adaptation}


class TestOthers:
    """Steering, and copies of adapted models."""

    @pytest.mark.parametrize("name", ["trainable_ct", "steered_probe"])
    def test_two_methods_on_the_same_sites(self, name: str, model: Net) -> None:
        with steer(model, beta=0.7, example=X):
            steered = state(model)
            with pytest.raises(SiteError, match="steered already"):
                put(model, name)
            assert state(model) == steered
        adaptation = put(model, name)
        with pytest.raises(SiteError, match="disable"):
            steer(model, beta=0.7, example=X)
        adaptation.disable()
        with steer(model, beta=0.7, example=X):
            steered = state(model)
            with pytest.raises(SiteError, match="steered already"):
                adaptation.enable()
            assert state(model) == steered
        adaptation.enable()

    @pytest.mark.parametrize("name", ["linear_probe", "lora", "full_finetune"])
    def test_the_others_go_with_steering(self, name: str, model: Net) -> None:
        before = state(model)
        steering = steer(model, beta=0.7, example=X)
        with torch.no_grad():
            steered = model(X)
        adaptation = put(model, name)
        train(adaptation)
        with adaptation.disable():
            assert torch.equal(model.eval()(X), steered)
        adaptation.remove()
        steering.remove()
        assert state(model) == before
        adaptation = put(model, name)
        train(adaptation)
        steering = steer(model, beta=0.7, example=X)
        steering.remove()
        adaptation.remove()
        model.eval()
        assert state(model) == before

    def test_part_of_a_model(self, model: Net) -> None:
        outer = nn.Sequential(model, nn.Linear(3, 2))
        adaptation = adapt(model, LinearProbe(), example=X)
        with pytest.raises(FlexureError, match="adaptation of '0' in place"):
            adapt(outer, LinearProbe(), example=X)
        adaptation.disable()
        adapt(outer, LinearProbe(), example=X)

    @EVERY
    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies_stay_adapted(self, name: str, how: str, model: Net) -> None:
        adaptation = put(model, name, classes=4)
        train(adaptation)
        expected = model.eval()(X)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert torch.equal(twin.eval()(X), expected)
        own = {id(p) for p in model.parameters()}
        assert not any(id(p) in own for p in twin.parameters())
        F.cross_entropy(twin(X), Y).backward()
        with pytest.raises(FlexureError, match="copy of an adapted model"):
            put(twin, "linear_probe")
        adaptation.remove()
        assert torch.equal(twin.eval()(X), expected)

    @EVERY
    def test_state_dict(self, name: str, model: Net) -> None:
        adaptation = put(model, name, classes=4)
        saved = copy.deepcopy(model.state_dict())
        before = model.eval()(X)
        train(adaptation, rate=0.1)
        assert not torch.equal(model.eval()(X), before)
        model.load_state_dict(saved)
        assert torch.equal(model.eval()(X), before)


class Unused(nn.Module):
    """Of three activations one goes nowhere, and one is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.used, self.unused, self.detached = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(self.second(x))
        return self.head(self.used(self.first(x)) + self.detached(self.second(x)).detach())


class TestGradients:
    X = torch.linspace(-1, 1, 32).reshape(8, 4)

    def test_a_parameter_without_a_gradient_is_named(self) -> None:
        model = Unused()
        adapt(model, TrainableCT(), example=self.X)
        with pytest.raises(FlexureError, match=r"unused\.raw_beta, .*detached\.raw_beta") as caught:
            F.cross_entropy(model(self.X), Y).backward()
        assert "none for unused" in str(caught.value)
        assert " used.raw" not in str(caught.value)

    def test_by_its_name_in_the_model(self) -> None:
        class Functional(Unused):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x + 0 * F.relu(x).detach())

        model = Functional()
        adaptation = adapt(model, TrainableCT(), example=self.X, where=":*", axis=-1)
        missing = [name for name in adaptation.trainable if name.startswith("flexure.")]
        assert missing
        with pytest.raises(FlexureError) as caught:
            F.cross_entropy(model(self.X), Y).backward()
        assert f"none for {', '.join(missing)}:" in str(caught.value)

    def test_also_in_a_fit(self) -> None:
        model = Unused()
        adaptation = adapt(model, TrainableCT(), example=self.X)
        optimizer = torch.optim.Adam(adaptation.parameter_groups())
        with pytest.raises(FlexureError, match=r"unused\.raw_beta"):
            flexure.fit(model, [(self.X, Y)], epochs=1, seed=0, optimizer=optimizer)

    def test_left_out_sites_need_none(self) -> None:
        model = Unused()
        adaptation = adapt(model, TrainableCT(), example=self.X, where="used")
        F.cross_entropy(model(self.X), Y).backward()
        assert adaptation.check_gradients()

    def test_a_head_that_is_not_reached(self, model: Net) -> None:
        adapt(model, TrainableCT(), example=X)
        features = []
        model.last.register_forward_hook(lambda m, args, out: features.append(out))
        loss = (model(X) * 0).detach().sum() + features[-1].sum()
        loss.backward()  # the output is not part of it: nothing is known yet
        model.zero_grad()
        some = [model.head.weight, model.act.raw_c]
        with pytest.raises(FlexureError, match=r"head\.bias"):
            model(X).sum().backward(inputs=some)

    def test_full_finetuning_may_leave_weights_unused(self) -> None:
        model = Unused()
        model.spare = nn.Linear(2, 2)
        adaptation = adapt(model, FullFinetune(), example=self.X)
        F.cross_entropy(model(self.X), Y).backward()
        assert adaptation.check_gradients()

    def test_waits_for_the_first_backward_into_parameters(self) -> None:
        model = Unused()
        adaptation = adapt(model, TrainableCT(), example=self.X)
        x = self.X.clone().requires_grad_()
        torch.autograd.grad(model(x).sum(), x)
        with torch.no_grad():
            model(x)
        assert not adaptation.check_gradients()
        with pytest.raises(FlexureError, match=r"unused\.raw_beta"):
            model(x).sum().backward()

    def test_a_backward_that_fails_is_none(self) -> None:
        model = Unused()
        adapt(model, TrainableCT(), example=self.X)
        out = model(self.X)
        out.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            out.sum().backward()
        model.zero_grad()
        with pytest.raises(FlexureError, match=r"unused\.raw_beta"):
            model(self.X).sum().backward()

    def test_looks_once(self, model: Net, monkeypatch: pytest.MonkeyPatch) -> None:
        adaptation = adapt(model, TrainableCT(), example=X)
        looks = []
        look = type(adaptation).check_gradients
        monkeypatch.setattr(
            type(adaptation), "check_gradients", lambda self: looks.append(1) or look(self)
        )
        train(adaptation, steps=3)
        assert looks == [1]

    def test_functional_call_and_transforms(self, model: Net) -> None:
        adaptation = adapt(model, TrainableCT(), example=X)
        values = {name: p.detach().clone() for name, p in model.named_parameters()}

        def loss(values: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, values, (X,)), Y)

        expected = loss({n: v.requires_grad_() for n, v in values.items()})
        grads = torch.autograd.grad(expected, values["act.raw_beta"])
        found = torch.func.grad(loss)({n: v.detach() for n, v in values.items()})
        torch.testing.assert_close(found["act.raw_beta"], grads[0])
        assert not adaptation.check_gradients()

    def test_outputs_of_any_shape(self) -> None:
        class Several(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Unused()

            def forward(self, x: Tensor) -> dict[str, object]:
                return {"all": [(self.inner(x), None)], "other": 3}

        model = Several()
        adapt(model, TrainableCT(), example=self.X, head="inner.head")
        with pytest.raises(FlexureError, match="unused"):
            model(self.X)["all"][0][0].sum().backward()


class TestFreeze:
    @EVERY
    def test_learned_values_become_constants(self, name: str, model: Net) -> None:
        before = state(model)
        adaptation = put(model, name, classes=4)
        train(adaptation, rate=0.05)
        expected, betas = model.eval()(X), adaptation.betas()
        adaptation.freeze()
        adaptation.freeze()
        torch.testing.assert_close(model.train()(X), expected, rtol=1e-5, atol=1e-6)
        assert not any(p.requires_grad for p in model.parameters())
        assert not model(X).requires_grad
        assert (adaptation.trainable, adaptation.count) == ((), 0)
        assert adaptation.betas().keys() == betas.keys()
        assert all(torch.equal(betas[site], now) for site, now in adaptation.betas().items())
        assert not any(type(m).__name__ == "TrainableCTU" for m in model.modules())
        with pytest.raises(FlexureError, match="frozen"):
            adaptation.parameter_groups()
        frozen = model(X)
        adaptation.disable()
        model.eval()
        assert state(model) == before
        adaptation.enable()
        assert torch.equal(model(X), frozen)
        adaptation.remove()
        assert state(model) == before

    @EVERY
    def test_frozen_while_disabled(self, name: str, model: Net) -> None:
        adaptation = put(model, name)
        train(adaptation)
        expected = model.eval()(X)
        adaptation.disable()
        model.eval()
        before = state(model)
        adaptation.freeze()
        assert state(model) == before
        adaptation.enable()
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)

    @EVERY
    def test_exports(self, name: str, model: Net) -> None:
        adaptation = put(model, name)
        train(adaptation)
        adaptation.freeze()
        program = torch.export.export(model.eval(), (X,))
        torch.testing.assert_close(program.module()(X), model(X))


class TestBadInput:
    CASES = (
        ("no such head", {"head": "nowhere"}, "path of a module"),
        ("not the head", {"head": "last"}, "to be the model's logits"),
        ("not linear", {"head": "act", "classes": 3}, "nn.Linear"),
        ("classes 0", {"classes": 0}, "positive whole number"),
        ("classes text", {"classes": "3"}, "positive whole number"),
        ("example", {"example": torch.zeros(3)}, "an example that runs"),
    )

    @EVERY
    @pytest.mark.parametrize(("what", "options", "message"), CASES)
    def test_is_refused_and_changes_nothing(
        self, name: str, what: str, options: dict[str, object], message: str, model: Net
    ) -> None:
        inner = put(model, "linear_probe", name="inner")
        before = state(model)
        with pytest.raises(FlexureError, match=message):
            put(model, name, **options)
        after = state(model)
        assert inner.active
        inner.disable()
        assert {k: v for k, v in before.items() if "hook" not in k and "train" not in k} == {
            k: v for k, v in after.items() if "hook" not in k and "train" not in k
        }

    @pytest.mark.parametrize("name", ["trainable_ct", "steered_probe", "lora"])
    def test_where_that_matches_nothing(self, name: str, model: Net) -> None:
        before = state(model)
        with pytest.raises(SiteError):
            put(model, name, where="nothing*")
        assert state(model) == before

    @pytest.mark.parametrize("name", ["linear_probe", "full_finetune"])
    def test_where_that_has_no_use(self, name: str, model: Net) -> None:
        before = state(model)
        with pytest.raises(FlexureError, match="where="):
            put(model, name, where="act")
        assert state(model) == before

    def test_a_method_on_a_model_without_its_layers(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        before = state(model)
        for row in (TrainableCT(), SteeredProbe(0.8)):
            with pytest.raises(SiteError):
                adapt(model, row, example=torch.randn(2, 4))
        assert state(model) == before

    def test_a_class_instead_of_a_method(self, model: Net) -> None:
        with pytest.raises(FlexureError, match="the class TrainableCT; call it"):
            adapt(model, TrainableCT, example=X)
        for wrong in ("lora", None, {"rank": 1}):
            with pytest.raises(FlexureError, match=r"TrainableCT\(\), got .*lora is LoRA"):
                adapt(model, wrong, example=X)

    def test_an_axis_that_has_no_use(self, model: Net) -> None:
        before = state(model)
        for name in ("lora", "linear_probe", "full_finetune"):
            with pytest.raises(FlexureError, match="no axis="):
                put(model, name, axis=1)
        assert state(model) == before

    @pytest.mark.parametrize("share", ["yes", 1, None])
    def test_share(self, share: object) -> None:
        with pytest.raises(FlexureError, match="share to be True or False"):
            TrainableCT(share=share)

    def test_nothing_to_train(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Identity())
        before = state(model)
        with pytest.raises(FlexureError, match="something to train"):
            adapt(model, LinearProbe(), example=torch.randn(2, 4), head="2")
        assert state(model) == before

    @pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), "fast", True])
    def test_rates(self, rate: object) -> None:
        for row in (TrainableCT, FullFinetune):
            with pytest.raises(FlexureError, match="rate"):
                row(learning_rate=rate)


def test_buffers_that_a_layer_binds_anew() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + self.training
            return self.head(x) + self.count

    model, x = Counter().eval(), torch.randn(8, 4)
    before = state(model)
    adaptation = adapt(model, FullFinetune(), example=x)
    model.train()(x)
    model(x)
    assert model.count == 2
    adaptation.disable()
    assert state(model.eval()) == before
    adaptation.enable()
    assert model.count == 2
    adaptation.remove()
    assert state(model) == before


def test_heads_under_two_names_and_inside_the_network() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.fc = self.classifier = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.body(x))

    model, x = Tied(), torch.randn(8, 4)
    before = state(model)
    adaptation = adapt(model, LinearProbe(), example=x, classes=5, head="fc")
    assert model.fc is model.classifier
    assert model(x).shape == (8, 5)
    F.cross_entropy(model(x), Y).backward()
    adaptation.remove()
    assert state(model) == before


def test_activations_in_a_composed_head_are_left_alone() -> None:
    head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), head)
    x = torch.randn(8, 4)
    before = state(model)
    adaptation = adapt(model, TrainableCT(), example=x, head="2")
    assert isinstance(model[1], CTU)
    assert type(model[2][1]) is nn.ReLU
    assert list(adaptation.betas()) == ["1"]
    model.train()
    assert not torch.equal(model(x), model(x))  # the head's own dropout follows the mode
    F.cross_entropy(model(x), Y).backward()
    with pytest.raises(SiteError, match="outside the head"):
        adapt(model, TrainableCT(), example=x, head="2", where="2.1", name="other")
    assert adaptation.active
    adaptation.remove()
    assert state(model) == before


def test_hooks_inside_a_head_stay_the_users() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 3)))
    x, calls = torch.randn(8, 4), []
    before = model[2][0].register_forward_hook(lambda *args: calls.append("before"))
    adapt(model, LinearProbe(), example=x, head="2")
    calls.clear()
    later = model[2][0].register_forward_hook(lambda *args: calls.append("later"))
    model(x)
    assert calls == ["before", "later"]
    before.remove()
    later.remove()
    model(x)
    assert calls == ["before", "later"]


def test_hooks_on_the_head_run_on_a_fresh_one_too(model: Net) -> None:
    calls: list[str] = []
    handle = model.head.register_forward_hook(lambda *args: calls.append("before"))
    adaptation = adapt(model, LinearProbe(), example=X, classes=4)
    calls.clear()
    model(X)
    handle.remove()
    model(X)
    assert calls == ["before"]
    adaptation.remove()
    model(X)
    assert calls == ["before"]


def test_every_method_satisfies_the_contract() -> None:
    for name, row in METHODS.items():
        made = method(name)
        assert made.name == name == row.name
        assert made.learning_rate > 0
        assert hash(made) == hash(method(name))
