"""Trainable CT: sites, counts, starts, and everything PyTorch does with a network."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexure.contracts import FlexureError, SiteError
from flexure.methods.adapt import adapt
from flexure.methods.baselines import SteeredProbe
from flexure.methods.trainable_ct import TrainableCT
from flexure.units import ctu
from flexure.units.catalogue import SPECS
from tests.methods.adapted import Net, batch, net, state, train
from tests.methods.test_steer import Routed, by_hand
from tests.networks import BasicBlock, Bottleneck, ResNet, Swin, resnet18, resnet50

X, Y = batch()


@pytest.fixture
def model() -> Net:
    return net()


def count(model: nn.Module, side: int = 32, **settings: bool) -> int:
    with adapt(model, TrainableCT(**settings), example=torch.zeros(1, 3, side, side)).enable() as a:
        return a.count


class TestCounts:
    """The table of SPEC.md, section 1."""

    def test_resnet18(self) -> None:
        assert count(resnet18()) == 7_808
        assert count(resnet18(), share=True) == 3_968

    def test_resnet50(self) -> None:
        assert count(resnet50()) == 45_440

    def test_resnet152(self) -> None:
        with torch.device("meta"):
            model = ResNet(Bottleneck, [3, 8, 36, 3], width=64)
        assert count(model.to_empty(device="cpu")) == 143_744

    @pytest.mark.parametrize(("depths", "expected"), [((2, 2, 6, 2), 35_328), ((2, 2, 18, 2), 0)])
    def test_swin(self, depths: tuple[int, ...], expected: int) -> None:
        with torch.device("meta"):
            model = Swin(96, depths, window=7, patch=4)
        model.to_empty(device="cpu")
        per_stage = [2 * 4 * 96 * 2**stage * depth for stage, depth in enumerate(depths)]
        assert count(model, 224) == sum(per_stage) == (expected or 72_192)

    def test_a_pair_a_channel_of_each_call(self, model: Net) -> None:
        adaptation = adapt(model, TrainableCT(), example=X)
        expected = {"act": 4, ":2": 2, ":3": 4, "slope": 4, ":5": 6}
        sizes = [len(beta) for beta in adaptation.betas().values()]
        assert sizes == [len(c) for c in adaptation.cs().values()] == list(expected.values())
        assert adaptation.count == 2 * sum(sizes)
        assert [n for n in adaptation.trainable if n.startswith("act")] == [
            "act.raw_beta",
            "act.raw_c",
        ]
        assert adaptation.trainable[-2:] != adaptation.trainable[:2]


class TestShare:
    def test_one_unit_a_module(self) -> None:
        block = BasicBlock(4, 4)
        model = nn.Sequential(block, nn.Flatten(), nn.Linear(64, 3))
        x = torch.randn(3, 4, 4, 4)
        adaptation = adapt(model, TrainableCT(share=True), example=x)
        assert adaptation.count == 2 * 4
        assert len(adaptation.trainable) == 4
        one, two = adaptation.betas()
        F.cross_entropy(model(x), torch.arange(3)).backward()
        torch.optim.Adam(adaptation.parameter_groups(), lr=0.1).step()
        assert torch.equal(adaptation.betas()[one], adaptation.betas()[two])
        assert not torch.all(adaptation.betas()[one] == adaptation.betas()[one][0])
        adaptation.freeze()
        assert torch.equal(adaptation.betas()[one], adaptation.betas()[two])

    def test_functions_are_not_shared(self) -> None:
        model, x = Routed(), torch.randn(4, 6)
        assert adapt(model, TrainableCT(), example=x, name="a").count == 5 * 12
        # the calls of inner.relu share; the two functions and act do not
        assert adapt(model, TrainableCT(share=True), example=x, name="b").count == 4 * 12

    def test_different_channels_of_one_module(self) -> None:
        block = Bottleneck(8, 2)
        model = nn.Sequential(block, nn.Flatten(), nn.Linear(128, 3))
        before = state(model)
        with pytest.raises(SiteError, match=r"2 channels|got 2 on axis -3 at 0:0 and 8 .* at 0:2"):
            adapt(model, TrainableCT(share=True), example=torch.randn(1, 8, 4, 4))
        assert state(model) == before
        adapt(model, TrainableCT(), example=torch.randn(1, 8, 4, 4))


class TestStart:
    def test_is_the_steered_network(self, model: Net) -> None:
        adaptation = adapt(model, TrainableCT(init_beta=0.7, init_c=0.25), example=X)
        assert all(torch.allclose(b, torch.tensor(0.7)) for b in adaptation.betas().values())
        assert all(torch.allclose(c, torch.tensor(0.25)) for c in adaptation.cs().values())
        trained = model(X)
        adaptation.remove()
        probe = adapt(model, SteeredProbe(0.7, 0.25), example=X)
        torch.testing.assert_close(model(X), trained)
        assert {b.unique().item() for b in probe.betas().values()} == {0.7}
        assert {c.unique().item() for c in probe.cs().values()} == {0.25}
        assert probe.betas().keys() == adaptation.betas().keys()
        assert (probe.count, probe.saturated) == (0, 0.0)

    def test_every_call_by_hand(self) -> None:
        model, x = Routed(), torch.randn(4, 6)
        expected = by_hand(model, x, 0.8, 0.5)
        adapt(model, TrainableCT(), example=x)
        torch.testing.assert_close(model(x), expected)

    @pytest.mark.parametrize("parameterization", ["reflected", "sigmoid"])
    def test_parameterization_and_its_rate(self, parameterization: str, model: Net) -> None:
        method = TrainableCT(parameterization=parameterization)
        adaptation = adapt(model, method, example=X)
        assert adaptation.parameter_groups()[0]["lr"] == method.learning_rate
        assert all(torch.allclose(b, torch.tensor(0.8)) for b in adaptation.betas().values())
        fast = TrainableCT(parameterization=parameterization, learning_rate=0.5)
        assert fast.learning_rate == 0.5

    def test_published_settings(self) -> None:
        method = TrainableCT(parameterization="sigmoid")
        assert (method.init_beta, method.init_c, method.learning_rate) == (0.8, 0.5, 0.1)
        assert method == TrainableCT(parameterization="sigmoid", learning_rate=0.1)

    @pytest.mark.parametrize(
        "settings",
        [
            {"init_beta": 1.5},
            {"init_c": -0.1},
            {"init_beta": math.nan},
            {"parameterization": "magic"},
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, object]) -> None:
        with pytest.raises(FlexureError, match="expected"):
            TrainableCT(**settings)

    def test_a_start_that_cannot_move(self, model: Net) -> None:
        before = state(model)
        with pytest.raises(FlexureError, match="gradient is exactly 0"):
            adapt(model, TrainableCT(init_beta=1.0), example=X)
        assert state(model) == before

    def test_saturated_share(self, model: Net) -> None:
        with adapt(model, SteeredProbe(1.0), example=X, name="probe").enable() as probe:
            assert probe.saturated == 0.0  # a constant is no sign of learning
        probe.remove()
        adaptation = adapt(model, TrainableCT(), example=X)
        assert adaptation.saturated == 0.0
        with torch.no_grad():
            model.act.raw_beta[:2] = model.act.raw_beta.new_tensor([0.995, 0.002])
        assert adaptation.saturated == pytest.approx(2 / adaptation.count)


class TestSites:
    def test_an_activation_that_the_example_did_not_show(self) -> None:
        class Branch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
                self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(x) if x.mean() > 100 else x
                return self.head(self.body(x))

        model, x = Branch(), torch.randn(8, 4)
        adaptation = adapt(model, TrainableCT(), example=x, head="head")
        model(x)
        with pytest.raises(SiteError, match="more activation calls"):
            model(x + 1000)
        adaptation.remove()
        adapt(model, TrainableCT(), example=x, head="head", where="body.1")
        model(x + 1000)

    def test_where(self, model: Net) -> None:
        adaptation = adapt(model, TrainableCT(), example=X, where=["act", "slope"])
        assert list(adaptation.betas()) == ["act", "slope"]
        train(adaptation)

    def test_an_ambiguous_axis_asks_for_one(self) -> None:
        class Bare(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(5, 5))
                self.head = nn.Linear(5, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(F.relu(torch.einsum("bij,jk->bik", x, self.weight)).mean(1))

        model, x = Bare(), torch.randn(8, 4, 5)
        before = state(model)
        with pytest.raises(SiteError, match=r":0, where .* give axis="):
            adapt(model, TrainableCT(), example=x)
        assert state(model) == before
        adaptation = adapt(model, TrainableCT(), example=x, axis={":0": 2})
        assert [b.shape for b in adaptation.betas().values()] == [(5,)]
        F.cross_entropy(model(x), Y).backward()

    def test_max_pooling_is_left(self) -> None:
        model = resnet18(4)
        adaptation = adapt(model, TrainableCT(), example=torch.zeros(1, 3, 32, 32))
        assert "maxpool" not in adaptation.betas()

    @pytest.mark.parametrize(
        "name", [n for n, s in SPECS.items() if not s.refusal and not s.optional and s.classes]
    )
    def test_every_activation_of_the_catalogue(self, name: str) -> None:
        kind = next((c for c in SPECS[name].classes if isinstance(c, type)), None)
        if kind is None:
            pytest.skip("its class belongs to a library that is not loaded")
        arguments = (
            (0.1, 1.0) if kind is nn.Threshold else (0.0, 6.0) if kind is nn.Hardtanh else ()
        )
        if kind is nn.Threshold:
            arguments = (0.0, 0.0)
        model = nn.Sequential(nn.Linear(4, 4), kind(*arguments), nn.Linear(4, 3)).eval()
        x = torch.linspace(-3, 3, 32).reshape(8, 4)
        before = state(model)
        adaptation = adapt(model, TrainableCT(), example=x)
        loss = F.cross_entropy(model(x), Y)
        loss.backward()
        assert model[1].raw_beta.grad.abs().sum() > 0
        torch.optim.Adam(adaptation.parameter_groups()).step()
        assert F.cross_entropy(model(x), Y) < loss
        adaptation.remove()
        assert state(model) == before

    def test_per_channel_values_reach_their_channels(self) -> None:
        model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
        x = torch.randn(4, 2, 2, 2)
        adapt(model, TrainableCT(), example=x)
        unit = model[1]
        with torch.no_grad():
            unit.raw_beta.copy_(torch.tensor([0.2, 0.5, 0.9]))
        h = model[0](x)
        expected = torch.stack([ctu(h[:, i], b, 0.5) for i, b in enumerate((0.2, 0.5, 0.9))], 1)
        torch.testing.assert_close(unit(h), expected)

    def test_a_slope_that_was_replaced_while_disabled(self, model: Net) -> None:
        adaptation = adapt(model, TrainableCT(), example=X)
        adaptation.disable()
        slopes = {"weight": torch.full((4,), 0.7)}
        model.slope.load_state_dict(slopes, assign=True)
        with torch.no_grad():
            plain = model(X)
        adaptation.enable()
        assert torch.equal(model.slope.weight, slopes["weight"])
        h = torch.full((1, 4, 1, 1), -50.0)
        torch.testing.assert_close(model.slope(h), 0.7 * h)
        adaptation.remove()
        assert torch.equal(model(X), plain)


class TestFramework:
    def test_compile(self) -> None:
        model, x = Routed(), torch.randn(4, 6)
        adaptation = adapt(model, TrainableCT(), example=x)
        model(x).square().sum().backward()
        eager = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        compiled(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-4, atol=1e-6)
        plain = compiled(x)
        with adaptation.disable():
            assert not torch.allclose(compiled(x), plain)
            torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), plain)

    def test_gradients_are_checked_of_a_compiled_model(self) -> None:
        from tests.methods.test_adapt import Unused

        model, x = Unused(), torch.randn(8, 4)
        adapt(model, TrainableCT(), example=x)
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(FlexureError, match=r"unused\.raw_beta"):
            compiled(x).sum().backward()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes_of_the_model(self, dtype: torch.dtype) -> None:
        model = net().to(dtype)
        adaptation = adapt(model, TrainableCT(), example=X.to(dtype), classes=4)
        model(X.to(dtype)).float().square().mean().backward()
        assert model.act.raw_beta.dtype == torch.float32
        assert model.act.raw_beta.grad.isfinite().all()
        assert model.head.weight.dtype == dtype
        assert model(X.to(dtype)).dtype == dtype
        assert adaptation.check_gradients()

    def test_autocast(self, model: Net) -> None:
        adaptation = adapt(model, TrainableCT(), example=X)
        wide = model(X)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(X)
        F.cross_entropy(out.float(), Y).backward()
        assert adaptation.check_gradients()
        torch.testing.assert_close(out.float(), wide, rtol=0.1, atol=0.05)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, reentrant: bool, model: Net) -> None:
        adaptation = adapt(model, TrainableCT(), example=X)
        grads = []
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
            model.zero_grad()
            F.cross_entropy(run(X.clone().requires_grad_()), Y).backward()
            grads.append(
                [p.grad.clone() for g in adaptation.parameter_groups() for p in g["params"]]
            )
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)

    def test_vmap_and_jvp(self, model: Net) -> None:
        adapt(model, TrainableCT(), example=X)
        with torch.no_grad():
            expected = model(X)
            found = torch.func.vmap(lambda x: model(x[None])[0])(X)
        torch.testing.assert_close(found, expected)
        out, _ = torch.func.jvp(model, (X,), (torch.ones_like(X),))
        torch.testing.assert_close(out, expected)

    def test_transformer_encoder(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(24, 3))
        model.eval()
        x = torch.randn(8, 3, 8)
        before = state(model)
        with torch.no_grad():
            plain = model(x)
        adaptation = adapt(model, TrainableCT(), example=x)
        assert adaptation.count == 2 * 2 * 12
        F.cross_entropy(model.train()(x), Y).backward()
        assert adaptation.check_gradients()
        with torch.no_grad():
            assert not torch.allclose(model(x), plain)  # the fused path is off
        adaptation.remove()
        with torch.no_grad():
            assert torch.equal(model(x), plain)
        assert state(model) == before

    @pytest.mark.parametrize("name", ["ViT", "BERT"])
    def test_transformers(self, name: str) -> None:
        pytest.importorskip("transformers")
        from tests.surgery.test_transformers import build

        model, example = build(name)
        before = state(model)
        adaptation = adapt(model, TrainableCT(), example=example, classes=4)
        assert adaptation.count == 2 * 2 * 24
        assert model(**example).logits.shape == (2, 4)
        optimizer = torch.optim.Adam(adaptation.parameter_groups())
        F.cross_entropy(model.train()(**example).logits, torch.tensor([0, 1])).backward()
        optimizer.step()
        assert adaptation.check_gradients()
        adaptation.remove()
        assert state(model) == before
