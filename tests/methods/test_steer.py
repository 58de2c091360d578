"""Steering: dials, reversal, everything PyTorch does with a model, and bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexure.contracts import DataError, FlexureError, SiteError
from flexure.methods.steer import steer
from flexure.surgery import sites
from flexure.units import CTU, ctu
from tests.networks import Swin, resnet18

BETA, C = 0.8, 0.3


class Routed(nn.Module):
    """Every kind of call in one model: root, nested, reused, functional, swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.inner = Inner()
        self.act = nn.ReLU()
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = self.inner(x)
        return self.last(self.act(torch.relu(x)))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(self.relu(self.linear(x))))


def by_hand(model: Routed, x: Tensor, beta: float, c: float) -> Tensor:
    h = ctu(model.first(x), beta, c)
    h = ctu(model.inner.linear(ctu(model.inner.linear(h), beta, c)), beta, c)
    return model.last(ctu(ctu(h, beta, c), beta, c))


@pytest.fixture
def model() -> Routed:
    return Routed()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6)


def state(model: nn.Module) -> dict[str, object]:
    """All that a model is: structure, tensors, hooks, attributes."""
    found: dict[str, object] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path] = type(module)
        for key, value in module.__dict__.items():
            found[f"{path}!{key}"] = list(value) if "_hook" in key and value else repr(value)
    return found


class TestDial:
    def test_equals_the_network_written_by_hand(self, model: Routed, x: Tensor) -> None:
        with steer(model, beta=BETA, c=C, example=x):
            torch.testing.assert_close(model(x), by_hand(model, x, BETA, C))

    def test_setting_the_dial(self, model: Routed, x: Tensor) -> None:
        steering = steer(model, beta=BETA, c=C, example=x)
        steering.beta = 0.6
        torch.testing.assert_close(model(x), by_hand(model, x, 0.6, C))
        steering.c = 1.0
        torch.testing.assert_close(model(x), by_hand(model, x, 0.6, 1.0))
        steering.c = "balanced"
        torch.testing.assert_close(model(x), by_hand(model, x, 0.6, 0.36 / 1.36))
        assert (steering.beta, steering.c) == (0.6, "balanced")

    def test_exact_at_1(self, model: Routed, x: Tensor) -> None:
        plain = model(x)
        grad = torch.autograd.grad(plain.sum(), list(model.parameters()))
        with steer(model, beta=1.0, c=C, example=x):
            assert torch.equal(model(x), plain)
            again = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(grad, again, strict=True))

    def test_a_dial_per_pattern(self, model: Routed, x: Tensor) -> None:
        steering = steer(
            model, beta={"inner:0": 0.5, "inner*": 0.7, "act": 0.9}, c={"*": C}, example=x
        )
        assert {name: unit.beta for name, unit in steering.units.items()} == {
            "inner:0": 0.5,
            "inner:1": 0.7,
            "act": 0.9,
        }
        h = ctu(model.inner.linear(F.relu(model.first(x))), 0.5, C)
        h = F.relu(ctu(model.inner.linear(h), 0.7, C))
        torch.testing.assert_close(model(x), model.last(ctu(h, 0.9, C)))
        with pytest.raises(SiteError, match="matches none"):
            steering.beta = {"nowhere": 0.5}
        with pytest.raises(SiteError, match="no pattern of beta matches inner:1, act"):
            steering.beta = {"inner:0": 0.5}
        assert steering.units["act"].beta == 0.9

    def test_where(self, model: Routed, x: Tensor) -> None:
        for where in ("inner:*", ["inner:0", "inner:1"], lambda site: site.caller == "inner"):
            with steer(model, beta=BETA, c=C, example=x, where=where) as steering:
                assert list(steering.units) == ["inner:0", "inner:1"]
                h = ctu(model.inner.linear(F.relu(model.first(x))), BETA, C)
                h = ctu(model.inner.linear(h), BETA, C)
                torch.testing.assert_close(model(x), model.last(F.relu(h)))

    def test_other_rectifiers_are_generalised(self, x: Tensor) -> None:
        model = nn.Sequential(
            nn.Linear(6, 6), nn.LeakyReLU(0.2), nn.PReLU(6, 0.3), nn.ReLU6(), nn.Hardtanh(0, 2)
        )
        with torch.no_grad():
            model[2].weight.copy_(torch.tensor([-0.5, 0, 0.3, 1, 1.5, 2]))
        a, b = 0.2, model[2].weight.detach().clone()
        before = model(x)
        keys = list(model.state_dict())
        with steer(model, beta=1.0, example=x):
            torch.testing.assert_close(model(x), before)
            assert list(model.state_dict()) == keys  # the slope stays the model's own
        with steer(model, beta=BETA, c=C, example=x):
            h = model[0](x)
            h = a * h + ctu((1 - a) * h, BETA, C)
            sign = torch.tensor([1.0, 1, 1, 1, -1, -1])
            h = b * h + sign * ctu(sign * (1 - b) * h, BETA, C)
            h = ctu(h, BETA, C) - ctu(h - 6, BETA, C)
            torch.testing.assert_close(model(x), ctu(h, BETA, C) - ctu(h - 2, BETA, C))
            model(x).sum().backward()
            assert model[2].weight.grad is not None

    def test_repr_tells_the_dial(self, model: Routed, x: Tensor) -> None:
        with steer(model, beta=BETA, c=C, example=x) as steering:
            assert repr(steering) == "Steering(beta=0.8, c=0.3, sites=5)"
            assert "CTU(relu, beta=0.8, c=0.3)" in repr(model)


class TestReversal:
    @pytest.mark.parametrize("build", [Routed, lambda: resnet18(8), lambda: Swin()])
    def test_remove_restores_everything(self, build) -> None:
        model = build()
        x = torch.randn(4, 6) if isinstance(model, Routed) else torch.randn(2, 3, 32, 32)
        model.eval()
        before, out, weights = state(model), model(x), copy.deepcopy(model.state_dict())
        steering = steer(model, beta=BETA, example=x)
        assert state(model) != before
        assert list(model.state_dict()) == list(weights)  # a checkpoint still loads, strictly
        model.load_state_dict(weights)
        steering.remove()
        steering.remove()
        assert state(model) == before
        assert torch.equal(model(x), out)

    def test_restored_after_an_error_inside_with(self, model: Routed, x: Tensor) -> None:
        before = state(model)
        with pytest.raises(ZeroDivisionError), steer(model, beta=BETA, example=x):
            raise ZeroDivisionError
        assert state(model) == before

    def test_mode_set_while_steered_survives(self, model: Routed, x: Tensor) -> None:
        with steer(model, beta=BETA, example=x):
            model.eval()
        assert not any(module.training for module in model.modules())

    def test_error_in_the_model_leaves_no_mode(self, model: Routed, x: Tensor) -> None:
        with steer(model, beta=BETA, example=x):
            with pytest.raises(RuntimeError, match="shapes"):
                model(torch.randn(4, 5))
            assert torch._C._len_torch_function_stack() == 0

    def test_interrupt_anywhere_leaves_the_model_usable(self, model: Routed, x: Tensor) -> None:
        steering = steer(model, beta=BETA, c=C, example=x)
        expected = model(x)

        def interrupt(*args: object) -> None:
            raise KeyboardInterrupt

        for path in ("first", "inner", "inner.linear", "act", "last"):
            handle = model.get_submodule(path).register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(x)
            handle.remove()
            # What the interrupted frames left behind must not touch anybody else's ReLU,
            assert torch.equal(F.relu(x), x.clamp(min=0))
            assert torch.equal(torch.relu(x), x.clamp(min=0))
            # nor the model's next run.
            assert torch.equal(model(x), expected)
            assert torch._C._len_torch_function_stack() == 0
        steering.remove()

    def test_interrupt_while_steering_restores(self, model: Routed, x: Tensor) -> None:
        before = state(model)
        calls = 0

        def interrupted():
            nonlocal calls
            calls += 1
            yield x
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            steer(model, beta=BETA, example=x, calibration=interrupted())
        assert calls == 1
        assert state(model) == before


class TestCalibration:
    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(16, 3, 32, 32, generator=generator) for _ in range(3)]

    def moments(self, model: nn.Module, x: Tensor, beta: float, **kwargs):
        """Channel moments at every site, by independent hooks, and the units' scales."""
        found, handles = {}, []
        with steer(model, beta=beta, example=x[:1], **kwargs) as steering:
            for name, unit in steering.units.items():

                def keep(unit, args, out, name=name) -> None:
                    moments = out.mean((0, 2, 3)), out.std((0, 2, 3), correction=0)
                    found[name] = (*moments, unit.scale)

                handles.append(unit.register_forward_hook(keep))
            with torch.no_grad():
                model(x)
            for handle in handles:
                handle.remove()
        return found

    @pytest.mark.parametrize("match", ["mean", "mean+std"])
    def test_channels_keep_their_moments(self, match: str) -> None:
        model, inputs = resnet18(4).eval(), self.inputs()
        x = torch.cat(inputs)
        plain = self.moments(model, x, 1.0)
        shifted = self.moments(model, x, 0.6)
        kept = self.moments(model, x, 0.6, calibration=inputs, match=match)
        matched = 0
        for name, (mean, std, _) in plain.items():
            new_mean, new_std, scale = kept[name]
            torch.testing.assert_close(new_mean, mean, atol=1e-5, rtol=1e-4)
            if match == "mean":
                assert torch.equal(scale, torch.ones_like(scale))
                continue
            inside = (scale > 0.5) & (scale < 2) & (std > 0)
            torch.testing.assert_close(new_std[inside], std[inside], atol=1e-5, rtol=1e-4)
            assert ((scale >= 0.5) & (scale <= 2)).all()
            matched += int(inside.sum())
        assert match == "mean" or matched > 100
        assert max((shifted[n][0] - plain[n][0]).abs().max() for n in plain) > 0.01

    def test_exactly_none_at_1_and_renewed_with_the_dial(self) -> None:
        model, inputs = resnet18(4).eval(), self.inputs()
        x = inputs[0]
        plain = model(x)
        with steer(model, beta=1.0, example=x, calibration=inputs, match="mean+std") as steering:
            assert torch.equal(model(x), plain)
            steering.beta = 0.7
            at_07 = model(x)
            steering.beta = 1.0
            assert torch.equal(model(x), plain)
            steering.beta = 0.7
            assert torch.equal(model(x), at_07)
        with steer(model, beta=0.7, example=x, calibration=inputs, match="mean+std"):
            assert torch.equal(model(x), at_07)

    def test_labels_are_ignored(self) -> None:
        model, inputs = resnet18(4).eval(), self.inputs()
        labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in inputs]
        outputs = []
        for calibration in (inputs, labelled):
            with steer(model, beta=0.7, example=inputs[0], calibration=calibration):
                outputs.append(model(inputs[0]))
        assert torch.equal(*outputs)

    def test_in_place_and_half_precision(self) -> None:
        model, x = resnet18(4).eval(), self.inputs()[0]
        with steer(model, beta=0.7, example=x, calibration=[x]) as steering:
            full = model(x)
            model.bfloat16()
            assert all(unit.shift.dtype == torch.float32 for unit in steering.units.values())
            half = model(x.bfloat16())
            model.float()
        assert half.dtype == torch.bfloat16
        assert (half.float() - full).abs().max() < 0.05 * full.abs().max()

    def test_bad_calibration(self, model: Routed, x: Tensor) -> None:
        before = state(model)
        with pytest.raises(DataError, match="got none"):
            steer(model, beta=BETA, example=x, calibration=[])
        with pytest.raises(DataError, match="not finite"):
            steer(model, beta=BETA, example=x, calibration=[x * math.nan])
        with pytest.raises(FlexureError, match="mean\\+std"):
            steer(model, beta=BETA, example=x, calibration=[x], match="median")
        twice = nn.Sequential(model.inner, nn.Linear(6, 6))
        loop = nn.Sequential(twice, twice)
        with pytest.raises(SiteError, match="more than once"):
            steer(loop, beta=BETA, example=x, calibration=[x])
        assert state(model) == before


class Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inside, self.reentrant = inside, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=self.reentrant)


class HidesCheckpoint(nn.Module):
    """Checkpoints a part of its own forward, with an activation inside."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.linear, self.reentrant = nn.Linear(6, 6), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: F.relu(self.linear(y)), x, use_reentrant=self.reentrant)


class TestPyTorch:
    @pytest.mark.parametrize("strict", [True, False])
    def test_export(self, model: Routed, x: Tensor, strict: bool) -> None:
        with steer(model, beta=BETA, c=C, example=x):
            exported = torch.export.export(model, (x,), strict=strict).module()
            torch.testing.assert_close(exported(x), model(x))

    def test_compile_fullgraph(self, model: Routed, x: Tensor) -> None:
        torch._dynamo.reset()
        with steer(model, beta=BETA, c=C, example=x) as steering:
            graphs = []

            def backend(graph, inputs):
                graphs.append(graph)
                return graph.forward

            compiled = torch.compile(model, fullgraph=True, backend=backend)
            for _ in range(3):
                torch.testing.assert_close(compiled(x), model(x))
            assert len(graphs) == 1
            steering.beta = 0.6
            torch.testing.assert_close(compiled(x), by_hand(model, x, 0.6, C))
            assert torch._C._len_torch_function_stack() == 0

    @pytest.mark.slow
    def test_compile_inductor_trains(self, model: Routed, x: Tensor) -> None:
        torch._dynamo.reset()
        with steer(model, beta=BETA, c=C, example=x):
            expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            compiled = torch.compile(model, fullgraph=True)
            found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_a_module(self, reentrant: bool, x: Tensor) -> None:
        x.requires_grad_()
        model = nn.Sequential(Checkpointed(Inner(), reentrant), nn.Linear(6, 2))
        with steer(model, beta=BETA, c=C, example=x):
            model(x).square().sum().backward()
            found = x.grad
            h = model[0].inside.linear(ctu(model[0].inside.linear(x), BETA, C))
            expected = torch.autograd.grad(model[1](ctu(h, BETA, C)).square().sum(), [x])[0]
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_inside_a_caller_is_refused(self, reentrant: bool, x: Tensor) -> None:
        model = nn.Sequential(HidesCheckpoint(reentrant), nn.Linear(6, 2))
        with steer(model, beta=BETA, c=C, example=x):
            with torch.no_grad():
                model(x)
            with pytest.raises(SiteError, match=r"inside torch\.utils\.checkpoint"):
                model(x.clone().requires_grad_())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast_and_half(self, model: Routed, x: Tensor, dtype: torch.dtype) -> None:
        with steer(model, beta=0.99, c=C, example=x):
            full = model(x)
            with torch.autocast("cpu", dtype):
                assert (model(x).float() - full).abs().max() < 0.02
            half = copy.deepcopy(model).to(dtype)(x.to(dtype))
            assert half.dtype == dtype
            assert (half.float() - full).abs().max() < 0.02

    def test_functional_call_vmap_and_jvp(self, model: Routed, x: Tensor) -> None:
        with steer(model, beta=BETA, c=C, example=x):
            doubled = {name: 2 * value for name, value in model.named_parameters()}
            called = torch.func.functional_call(model, doubled, (x,))
            mapped = torch.func.vmap(lambda row: model(row[None])[0])(x)
            torch.testing.assert_close(mapped, model(x))
            direction = torch.randn_like(x)
            _, slope = torch.func.jvp(model, (x,), (direction,))
            _, by_reverse = torch.autograd.functional.jvp(model, x, direction)
            torch.testing.assert_close(slope, by_reverse)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        torch.testing.assert_close(called, by_hand(model, x, BETA, C))

    def test_two_threads_at_once(self, model: Routed, x: Tensor) -> None:
        from concurrent.futures import ThreadPoolExecutor

        with steer(model, beta=BETA, c=C, example=x), ThreadPoolExecutor(4) as pool:
            expected = model(x).detach()
            outputs = list(pool.map(lambda _: model(x).detach(), range(64)))
        assert all(torch.equal(out, expected) for out in outputs)


class TestBadInput:
    @pytest.mark.parametrize(
        ("beta", "c"),
        [(-0.1, 0.5), (1.1, 0.5), (math.nan, 0.5), (0.5, 2), (0.5, math.nan), (0.5, "even")],
    )
    def test_dial(self, model: Routed, x: Tensor, beta: float, c: float) -> None:
        before = state(model)
        for kwargs in ({"beta": beta, "c": c}, {"beta": {"*": beta}, "c": {"*": c}}):
            with pytest.raises(FlexureError):
                steer(model, example=x, **kwargs)
        assert state(model) == before
        with steer(model, beta=BETA, c=C, example=x) as steering:
            with pytest.raises(FlexureError):
                steering.dial(beta, c)
            assert all((unit.beta, unit.c) == (BETA, C) for unit in steering.units.values())

    @pytest.mark.parametrize(
        "example",
        [torch.randn(4, 5), torch.randn(4, 6).double(), torch.randn(4, 6, device="meta"), "text"],
    )
    def test_example(self, model: Routed, example: object) -> None:
        before = state(model)
        with pytest.raises(SiteError, match=r"example does not run.*float32 on cpu"):
            steer(model, beta=BETA, example=example)
        assert state(model) == before

    def test_steered_already(self, model: Routed, x: Tensor) -> None:
        with steer(model, beta=BETA, example=x):
            inside = state(model)
            with pytest.raises(SiteError, match="steered already"):
                steer(model, beta=0.5, example=x)
            assert state(model) == inside

    def test_a_child_named_as_ours(self, model: Routed, x: Tensor) -> None:
        model.flexure = nn.Linear(1, 1)
        with pytest.raises(SiteError, match="'flexure'"):
            steer(model, beta=BETA, example=x)
        assert type(model.act) is nn.ReLU


def test_units_are_ctus(model: Routed, x: Tensor) -> None:
    with steer(model, beta=BETA, example=x) as steering:
        assert all(isinstance(unit, CTU) for unit in steering.units.values())
        assert str(steering.report).count("exact at beta=1") == 5


@pytest.mark.parametrize("inplace", [True, False])
def test_hessian_products_agree_in_every_mode(inplace: bool) -> None:
    model = resnet18(4).eval().double()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    x, v = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64)
    with steer(model, beta=BETA, c=C, example=x):
        gradient = torch.func.grad(lambda z: model(z).square().sum())
        forward_over_reverse = torch.func.jvp(gradient, (x,), (v,))[1]
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)[0]
        reverse_over_reverse = torch.autograd.grad((first * v).sum(), leaf)[0]
        difference = (gradient(x + 1e-5 * v) - gradient(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(forward_over_reverse, difference, atol=1e-8, rtol=1e-5)
    torch.testing.assert_close(reverse_over_reverse, difference, atol=1e-8, rtol=1e-5)


class Sandwich(nn.Module):
    """A routed call, then a swapped module, in one caller."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()
        self.pool = nn.MaxPool1d(2)
        self.more: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(input=self.b(F.relu(self.a(x))))
        if self.more == "function":
            x = F.relu(x - 0.3)
        return self.pool(x)


class TestCompleteness:
    def test_calibration_is_no_call_of_the_network(self, x: Tensor) -> None:
        model = Sandwich()
        with steer(model, beta=0.5, example=x, calibration=[x], pooling=True) as steering:
            assert all(unit.shift is not None for unit in steering.units.values())
            first = steering.units[":0"]
            h = model.a(x)
            expected = torch.relu(h).mean(0)
            found = (first.phi(h) + first.shift).mean(0)
            torch.testing.assert_close(found, expected)
        with steer(model, beta=1.0, example=x, pooling=True):
            assert torch.equal(model(x), Sandwich.forward(model, x))

    def test_a_new_branch_of_a_network_with_only_modules(self, x: Tensor) -> None:
        model = Sandwich()
        model.more = None
        with steer(model, beta=BETA, example=x):
            model(x)
            model.more = "function"
            with pytest.raises(SiteError, match="activation call 1 was max_pool1d"):
                model(x)
        plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Identity())
        with steer(plain, beta=BETA, example=x):
            plain(x)
            plain[2] = nn.ReLU()
            with pytest.raises(SiteError, match=r"\(model\).*extra relu"):
                plain(x)

    @pytest.mark.parametrize("spare", ["spare", "gate"])
    def test_gates_may_be_called_any_number_of_times(self, spare: str, x: Tensor) -> None:
        class Loop(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear, self.steps = nn.Linear(6, 6), 2

            def forward(self, x: Tensor) -> Tensor:
                for _ in range(self.steps):
                    x = torch.tanh(self.linear(x))
                return F.relu(x)

        model = Loop()
        with steer(model, beta=BETA, example=x):
            model.steps = 5
            model(x)

    def test_a_pattern_for_everything_is_everything(self, x: Tensor) -> None:
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.RReLU())
        for where in (None, "*", ["*"], "2"):
            with pytest.raises(SiteError, match="rrelu"):
                steer(model, beta=BETA, example=x, where=where)
        with steer(model, beta=BETA, example=x, where="1"):
            model(x)
        with pytest.raises(SiteError, match="at least one site"):
            steer(model, beta={}, example=x, where="1")

    def test_compiled_before_steering(self, x: Tensor) -> None:
        model = nn.Sequential(Routed())
        outer = HidesCheckpointFree(model[0])
        torch._dynamo.reset()
        compiled = torch.compile(outer, backend="eager")
        plain = compiled(x)
        for _ in range(2):
            with steer(outer, beta=0.3, c=C, example=x):
                torch.testing.assert_close(compiled(x), by_hand(model[0], x, 0.3, C))
            assert torch.equal(compiled(x), plain)

    def test_a_prehook_that_raises_leaves_the_outer_frame(self, x: Tensor) -> None:
        class Forgiving(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Inner()

            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(x)
                try:
                    x = self.inner(x)
                except ZeroDivisionError:
                    x = x + 1
                return F.relu(x - 1.2)

        model, raising = Forgiving(), False

        def prehook(*args: object) -> None:
            if raising:
                raise ZeroDivisionError

        model.inner.register_forward_pre_hook(prehook)
        with steer(model, beta=BETA, c=C, example=x):
            raising = True
            expected = ctu(ctu(x, BETA, C) - 0.2, BETA, C)
            torch.testing.assert_close(model(x), expected)
            assert torch._C._len_torch_function_stack() == 0


class HidesCheckpointFree(nn.Module):
    """A plain parent, so that the routed caller is an inner module."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


class TestNoTrace:
    def test_inputs_buffers_and_generators_survive_calibration(self) -> None:
        class Writes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 6)
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.count += 1
                x.sub_(1).div_(0.5)
                return F.relu(self.linear(x) + 0 * torch.rand_like(x))

        model, x = Writes(), torch.randn(16, 6)
        given, generator = x.clone(), torch.get_rng_state()
        with steer(model, beta=BETA, c=C, example=x, calibration=[x]) as steering:
            shift = steering.units[":0"].shift
        assert torch.equal(x, given)
        assert torch.equal(torch.get_rng_state(), generator)
        assert model.count == 0
        h = model.linear((given - 1) / 0.5)
        torch.testing.assert_close(shift, (torch.relu(h) - ctu(h, BETA, C)).mean(0))

    def test_interrupted_redial_keeps_the_old_dial(self, model: Routed, x: Tensor) -> None:
        steering = steer(model, beta=BETA, c=C, example=x, calibration=[x])
        expected = model(x)

        def interrupt(*args: object) -> None:
            raise KeyboardInterrupt

        handle = model.act.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            steering.beta = 0.6
        handle.remove()
        assert steering.beta == BETA
        assert torch.equal(model(x), expected)
        steering.remove()
        with pytest.raises(SiteError, match="removed"):
            steering.beta = 0.7

    def test_a_checkpoint_loads_strictly_while_calibrated(self, model: Routed, x: Tensor) -> None:
        weights = copy.deepcopy(model.state_dict())
        with steer(model, beta=BETA, example=x, calibration=[x]):
            model.load_state_dict(weights)
            assert torch.equal(copy.deepcopy(model)(x), model(x))

    def test_slopes_assigned_while_steered_stay(self, x: Tensor) -> None:
        model = nn.Sequential(nn.Linear(6, 6), nn.PReLU())
        new = {**model.state_dict(), "1.weight": torch.tensor([0.7])}
        with steer(model, beta=BETA, example=x):
            model.load_state_dict(new, assign=True)
        assert model[1].weight.item() == pytest.approx(0.7)

    def test_parametrised_slopes_stay_parametrised(self, x: Tensor) -> None:
        model = nn.Sequential(nn.Linear(6, 6), nn.PReLU())
        nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
        before = list(model.state_dict())
        plain = model(x)
        assert [site.name for site in sites(model, x).sites] == ["1:0"]
        with steer(model, beta=1.0, example=x):
            assert list(model.state_dict()) == before
            torch.testing.assert_close(model(x), plain)
            model(x).sum().backward()
        assert model[1].parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_capped_rectifiers_are_exact_at_1_for_every_input(dtype: torch.dtype) -> None:
    values = [0.0, 1.5, 3.0, 4.7, 5.99, 6.0, 6.01, 40, 600, 5000, 60000, 1e8, math.inf]
    x = torch.tensor([[sign * v for v in values for sign in (1, -1)]]).to(dtype)
    for module in (nn.ReLU6(), nn.Hardtanh(0, 0.3)):
        model = nn.Sequential(nn.Identity(), module)
        expected = model(x)
        with steer(model, beta=1.0, example=x):
            assert torch.equal(model(x), expected)
        with steer(model, beta=BETA, c=C, example=x):
            cap = module.max_val
            assert ((model(x) >= -0.3) & (model(x) <= cap + 0.3)).all()
            assert (model(x)[0, -2], model(x)[0, -1]) == (expected[0, -2], 0)
