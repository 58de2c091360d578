"""Low-rank changes of weights: every layer, every way to read a weight, and an exact way back."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from flexure.contracts import SiteError
from flexure.surgery.low_rank import LowRank, LowRankWeights
from flexure.surgery.weight_layers import LAYER_KINDS, weight_layers
from tests.networks import BasicBlock, Swin


def change(model: nn.Module, rank: int = 2, learned: float = 0.1) -> LowRankWeights:
    """A change of every layer, as if something had been learned; all else is frozen."""
    model.requires_grad_(False)
    weights = LowRankWeights(model, weight_layers(model), rank=rank, alpha=3)
    for factors in weights.factors.values():
        nn.init.normal_(factors.B, std=learned)
    return weights


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, 2, padding_mode="circular"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, (3, 1), groups=4, padding="same"), (2, 4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1, padding_mode="replicate"), (2, 2, 4, 3, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, groups=2), (2, 4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1), (2, 4, 3, 3)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (2, 2, 3, 3, 3)),
    "linear_inputs_first": (conv1d, (2, 4)),
}


def test_every_kind_is_tested() -> None:
    assert LAYERS.keys() == {kind.name for kind in LAYER_KINDS if kind.refusal is None}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_the_changed_weight(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().double()
    plain, x = copy.deepcopy(layer), torch.randn(shape, dtype=torch.float64)
    weights = change(layer)
    (factors,) = weights.factors.values()
    matrix = 1.5 * factors.B.detach() @ factors.A.detach()
    expected = matrix.T if name == "linear_inputs_first" else matrix.reshape(plain.weight.shape)
    with torch.no_grad():
        plain.weight += expected
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(matrix) == 2


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_the_one_of_finite_differences(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    (factors,) = change(layer).factors.values()
    assert torch.autograd.gradcheck(lambda *_: layer(x), (factors.A, factors.B))


def test_the_first_factors() -> None:
    weight = torch.randn(5, 3, 2, 2)
    first, again = (
        LowRank(weight, rank=200, alpha=1, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert torch.equal(first.A, again.A)
    assert not first.B.any()
    assert first.A.shape == (200, 12)
    assert first.B.shape == (5, 200)
    # Uniform within the bound of kaiming_uniform with a = sqrt(5).
    reference = nn.init.kaiming_uniform_(torch.empty(200, 12), a=5**0.5)
    assert first.A.abs().max() <= 12**-0.5
    torch.testing.assert_close(first.A.std(), reference.std(), rtol=0.05, atol=0)
    assert torch.equal(first(weight), weight)


def test_the_default_generator_draws_and_a_given_one_leaves_it_alone() -> None:
    state = torch.get_rng_state()
    LowRank(torch.zeros(3, 4), rank=1, alpha=1, generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())
    drawn = LowRank(torch.zeros(3, 4), rank=1, alpha=1)
    torch.set_rng_state(state)
    assert torch.equal(drawn.A, LowRank(torch.zeros(3, 4), rank=1, alpha=1).A)


class Attends(nn.Module):
    """Uses the weight of `out_proj` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (lambda: BasicBlock(3, 4, 2), (2, 3, 6, 6)),
    "swin": (lambda: Swin(depths=(1, 1)), (2, 3, 8, 8)),
    "attention": (Attends, (2, 3, 8)),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[request.param]
    return make().eval(), torch.randn(shape)


def test_every_factor_gets_a_gradient(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    weights = change(model)
    model(x).square().sum().backward()
    for path, factors in weights.factors.items():
        for factor in factors.parameters():
            assert factor.grad is not None, path
            assert factor.grad.any(), path
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_withdrawing_restores_exactly_and_inserting_brings_back(
    case: tuple[nn.Module, Tensor],
) -> None:
    model, x = case
    called: list[int] = []
    handles = [m.register_forward_hook(lambda *_: called.append(1)) for m in model.modules()]
    before = model.requires_grad_(False)(x)
    calls = len(called)
    names = [(name, id(p)) for name, p in model.named_parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]

    weights = change(model)
    held = [id(p) for factors in weights.factors.values() for p in factors.parameters()]
    changed = model(x)
    assert not torch.allclose(changed, before)
    for _ in range(2):
        weights.withdraw()
        weights.withdraw()
        assert names == [(name, id(p)) for name, p in model.named_parameters()]
        assert classes == [type(module) for module in model.modules()]
        found = model.state_dict()
        assert list(found) == list(state)
        assert all(torch.equal(found[key], state[key]) for key in state)
        called.clear()
        assert torch.equal(model(x), before)
        assert len(called) == calls
        weights.insert()
        weights.insert()
        assert torch.equal(model(x), changed)
        assert held == [id(p) for f in weights.factors.values() for p in f.parameters()]
        own = [(name, id(p)) for name, p in model.named_parameters() if "low_rank" not in name]
        assert own == names
    for handle in handles:
        handle.remove()


def test_merging_gives_constants_and_can_be_withdrawn(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    before = model.requires_grad_(False)(x)
    names = [(name, id(p)) for name, p in model.named_parameters()]
    weights = change(model)
    changed = model(x).detach()
    expected = {path: group[0].module.weight for path, group in weights.layers.items()}
    weights.merge()
    weights.merge()
    assert weights.merged
    for path, group in weights.layers.items():
        assert torch.equal(group[0].module.weight, expected[path])
    torch.testing.assert_close(model(x), changed)  # attention: now by the fused path
    merged = model(x)
    assert not any(p.requires_grad for p in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in names]
    assert not any("LowRank" in type(m).__name__ for m in model.modules())
    weights.withdraw()
    assert torch.equal(model(x), before)
    assert names == [(name, id(p)) for name, p in model.named_parameters()]
    weights.insert()
    assert torch.equal(model(x), merged)


def test_merging_while_withdrawn_stays_withdrawn() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    x = torch.randn(2, 3)
    before = model(x)
    weights = change(model)
    changed = model(x)
    weights.withdraw()
    weights.merge()
    assert torch.equal(model(x), before)
    weights.insert()
    assert torch.equal(model(x), changed)


def test_copies_are_independent(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    weights = change(model)
    changed = model(x)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [
        copy.deepcopy(model),
        *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, pickle.HIGHEST_PROTOCOL)),
        torch.load(stored, weights_only=False),
    ]
    weights.withdraw()
    for other in copies:
        assert torch.equal(other(x), changed)
        assert [type(m).__name__ for m in other.modules()].count("LowRank") == len(weights.factors)
        other(x).square().sum().backward()


def test_a_pickle_opens_in_another_process(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3)
    change(model)
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, x, y = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(model(x), y)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_state_dicts_keep_the_names_of_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    change(model)
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys == [f"{i}.low_rank.{name}" for i in (0, 1) for name in "AB"]
    other = copy.deepcopy(plain)
    change(other)
    for assign in (False, True):
        other.load_state_dict(model.state_dict(), assign=assign)
        x = torch.randn(2, 3)
        assert torch.equal(other(x), model(x))


def test_functional_call_and_vmap_see_weights_and_factors() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()), torch.randn(4, 2, 5, 5)
    change(model)
    values = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(model, values, (x,)), model(x))
    zeroed = {key: torch.zeros_like(value) for key, value in values.items()}
    assert not torch.func.functional_call(model, zeroed, (x,)).any()

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x[None],)).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    model(x).sum().backward()
    torch.testing.assert_close(each["0.low_rank.A"].sum(0), model[0].low_rank.A.grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fused_transformer_path_is_the_slow_one(norm_first: bool, masked: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = masked
    with torch.no_grad():
        before = model(x, src_key_padding_mask=mask)
    weights = change(model)
    assert len(weights.factors) == 6  # linear1, linear2 and out_proj of both
    slow = model(x, src_key_padding_mask=mask)
    with torch.no_grad():
        fused = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(fused[~mask], slow[~mask])
    assert (fused - before)[~mask].abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_are_float32_or_wider(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3).to(dtype)
    (factors,) = change(model).factors.values()
    assert factors.A.dtype == factors.B.dtype == torch.promote_types(dtype, torch.float32)
    assert model.weight.dtype == dtype
    out = model(torch.randn(2, 4, dtype=dtype))
    assert out.dtype == dtype
    out.sum().backward()
    assert factors.A.grad is not None
    assert factors.A.grad.dtype == factors.A.dtype
    exact = model._parameters["weight"].float() + factors.scale * factors.B @ factors.A
    assert torch.equal(model.weight, exact.to(dtype))


def test_autocast_and_the_merged_weight_agree() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(4, 4, 3)), torch.randn(2, 4, 8)
    weights = change(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16
        assert model[0].weight.dtype == torch.float32
        out.sum().backward()
    weights.merge()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), out)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model, x = Swin(depths=(1, 1)).eval(), torch.randn(2, 3, 8, 8, requires_grad=True)
    weights = change(model)
    parameters = [p for f in weights.factors.values() for p in f.parameters()]
    plain = torch.autograd.grad(model(x).square().sum(), parameters)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for parameter, expected in zip(parameters, plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_compiled_models_notice_what_comes_and_goes(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    torch._dynamo.reset()
    before = model.requires_grad_(False)(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    weights = change(model)
    changed = model(x)
    torch.testing.assert_close(compiled(x), changed)
    weights.withdraw()
    torch.testing.assert_close(compiled(x), before)
    weights.insert()
    torch.testing.assert_close(compiled(x), changed)
    weights.merge()
    torch.testing.assert_close(compiled(x), changed)


def test_export(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    weights = change(model)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
    assert {f"{path}.low_rank.A" for path in weights.factors} <= exported.state_dict.keys()


WORKER = """
import os, sys, torch

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
)
model, x = torch.load(f"{folder}/given.pt", weights_only=False)
wrapped = torch.nn.parallel.DistributedDataParallel(model)
wrapped(x[rank::2]).square().mean().backward()
torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
torch.distributed.barrier()
os._exit(0)  # gloo may abort where one process tears down before the other
"""


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    model, x = Swin(depths=(1, 1)).eval(), torch.randn(4, 3, 8, 8)
    change(model)
    torch.save((model, x), tmp_path / "given.pt")
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(rank)])
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    model(x).square().mean().backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("low_rank" in name)
            torch.testing.assert_close(grads[name], parameter.grad)


class Tied(nn.Module):
    """A decoder that shares its weight: with another Linear, or with an embedding, as BERT's."""

    def __init__(self, with_embedding: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.encoder = nn.Linear(4, 6)
        self.middle = nn.Linear(6, 4)
        self.decoder = nn.Linear(4, 6)
        self.decoder.weight = (self.embedding if with_embedding else self.encoder).weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.middle(self.encoder(self.embedding(x))))


def test_tied_layers_share_their_factors() -> None:
    model, x = Tied(with_embedding=False), torch.tensor([1, 5])
    weights = change(model)
    assert list(weights.factors) == ["encoder", "middle"]
    assert [layer.path for layer in weights.layers["encoder"]] == ["encoder", "decoder"]
    assert torch.equal(model.encoder.weight, model.decoder.weight)
    assert model.encoder.low_rank is model.decoder.low_rank
    assert sum(p.requires_grad for p in model.parameters()) == 4
    other = copy.deepcopy(model)
    assert other.encoder.low_rank is other.decoder.low_rank
    changed = model(x)
    weights.merge()
    assert model.encoder.weight is model.decoder.weight
    assert torch.equal(model(x), changed)
    weights.withdraw()
    assert model.encoder.weight is model.decoder.weight


def test_layers_tied_to_what_is_not_changed_are_refused() -> None:
    model = Tied(with_embedding=True)
    with pytest.raises(SiteError, match=r"'decoder' shares its weight with 'embedding' \(Embed"):
        LowRankWeights(model, weight_layers(model), rank=1, alpha=1)
    model = Tied(with_embedding=False)
    with pytest.raises(SiteError, match="'encoder' shares its weight with 'decoder'"):
        LowRankWeights(model, weight_layers(model, outside="decoder"), rank=1, alpha=1)
    assert type(model.middle) is nn.Linear


def test_one_layer_under_two_names_is_one() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.append(model[0])
    (layer,) = weight_layers(model)
    assert layer.paths == ("0", "2")
    assert len(change(model).factors) == 1


def test_what_is_outside_is_left_out() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Sequential(nn.Linear(2, 2))})
    assert [layer.path for layer in weight_layers(model, outside="head")] == ["body"]


def meta() -> nn.Module:
    return nn.Linear(2, 2, device="meta")


def integers() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    return layer


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5)


def subclassed() -> nn.Module:
    class Marked(nn.Parameter):
        pass

    layer = nn.Linear(2, 2)
    layer._parameters["weight"] = Marked(torch.ones(2, 2))
    return layer


def named() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.low_rank = 3
    return layer


def quantized() -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
        patch.setattr(torch.backends.quantized, "engine", engine)
        model = nn.Sequential(nn.Linear(2, 2))
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})[0]


def already() -> nn.Module:
    layer = nn.Linear(2, 2)
    change(layer)
    return layer


def peft_layer() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=1, target_modules=["0"])
    return peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config).base_model.model[0]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (meta, "meta device"),
    "integers": (integers, "int8"),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "computed"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)), "computed"),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(2, 2)), "computed"),
    "pruned": (pruned, "computed"),
    "lazy": (lambda: nn.LazyLinear(2), "no shape yet"),
    "subclassed": (subclassed, "Marked"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
    "attribute": (named, "attribute named 'low_rank'"),
    "script": (lambda: torch.jit.script(nn.Linear(2, 2)), "TorchScript"),
    "quantized": (quantized, "quantised"),
    "peft": (peft_layer, "PEFT adapts it already"),
    "already": (already, "already"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refusals_name_the_layer_and_change_nothing(name: str) -> None:
    make, reason = REFUSED[name]
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"deep": make()}))
    with pytest.raises(SiteError, match=rf"'1\.deep'.*{reason}"):
        LowRankWeights(model, weight_layers(model), rank=1, alpha=1)
    assert type(model[0]) is nn.Linear
    assert not any(isinstance(m, LowRank) for m in model[0].modules())


def test_a_layer_changed_on_top_stops_the_withdrawal() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weights = change(model)
    model[1].__class__ = type("Other", (type(model[1]),), {})
    with pytest.raises(SiteError, match="'1' has become a Other"):
        weights.withdraw()
    model[1].__class__ = type(model[1]).__mro__[1]
    weights.withdraw()
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


def test_inserting_into_layers_changed_meanwhile_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = change(model)
    first.withdraw()
    second = change(model)
    with pytest.raises(SiteError, match=r"'0'.*already"):
        first.insert()
    second.withdraw()
    first.insert()


def test_modes_and_dtypes_follow_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    weights = change(model)
    (factors,) = weights.factors.values()
    assert not factors.training
    model.double()
    assert factors.A.dtype == torch.float64
    weights.withdraw()
    model.train()
    weights.insert()
    assert factors.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_to_half_precision_leaves_factors_and_gradients_alone(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    (factors,) = change(model).factors.values()
    model(torch.randn(5, 4)).sum().backward()
    before = [(p, p.detach().clone(), p.grad.clone()) for p in factors.parameters()]
    optimizer = torch.optim.SGD(factors.parameters(), 0.1)
    model.to(dtype)
    assert model[0]._parameters["weight"].dtype == dtype
    for (p, value, gradient), now in zip(before, factors.parameters(), strict=True):
        assert p is now
        assert torch.equal(p, value)
        assert torch.equal(p.grad, gradient)
    optimizer.step()
    assert all(torch.allclose(p, value - 0.1 * gradient) for p, value, gradient in before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_factors_follow_a_model_that_moved_meanwhile() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.randn(3, 2)
    before = model(x)
    weights = change(model)
    changed = model(x)
    held = [id(p) for p in weights.factors["0"].parameters()]
    weights.withdraw()
    model.cuda()
    weights.insert()
    assert held == [id(p) for p in weights.factors["0"].parameters()]
    torch.testing.assert_close(model(x.cuda()).cpu(), changed)
    weights.merge()
    model.cpu()
    torch.testing.assert_close(model(x), changed)
    weights.withdraw()
    torch.testing.assert_close(model(x), before)


def test_a_user_class_of_layers_keeps_what_it_does() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    layer, x = Standardised(2, 3, 3), torch.randn(1, 2, 4, 4)
    change(layer)
    weight = layer.weight.detach()
    assert not torch.equal(weight, layer._parameters["weight"])
    expected = F.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert isinstance(layer, Standardised)


def test_an_error_in_the_factors_is_not_hidden() -> None:
    """`nn.Module` answers an AttributeError of a property by the Parameter of that name."""
    layer: Any = nn.Linear(2, 2)
    change(layer)
    del layer._modules["low_rank"]
    with pytest.raises(KeyError, match="low_rank"):
        layer(torch.randn(1, 2))
