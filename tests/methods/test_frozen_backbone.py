"""What an adaptation leaves alone stays as it is, and comes back in the model's own dtype."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexure.contracts import FlexureError
from flexure.methods.adapt import Adaptation, adapt
from flexure.methods.catalogue import METHODS
from flexure.surgery.census import sites
from tests.methods.adapted import contents, method, same

FROZEN = pytest.mark.parametrize("name", [n for n, row in METHODS.items() if row.freezes])
TRAINED = {"trainable_ct": {"1.1", "2.act"}, "lora": {"0.low_rank"}}
"""What each method trains in `network`; none of it has a mode to speak of."""

Z = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(16) % 3


class Running(nn.Module):
    """A user's block: a mean that moves in train mode, around one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.5)
        return self.act(x - self.mean)


def network() -> nn.Sequential:
    """Containers without parameters of their own around each activation and the head."""
    torch.manual_seed(4)
    block = nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Dropout(0.5))
    classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))
    return nn.Sequential(nn.Linear(6, 8), block, Running(), classifier).eval()


def train(adaptation: Adaptation, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(adaptation.parameter_groups(), lr=0.05)
    for _ in range(steps):
        adaptation.model.train()
        optimizer.zero_grad()
        F.cross_entropy(adaptation.model(Z), Y).backward()
        optimizer.step()


@FROZEN
def test_siblings_and_ancestors_of_what_is_trained_stay_in_eval_mode(name: str) -> None:
    model = network()
    before = contents(model)
    adaptation = adapt(model, method(name), example=Z, head="3.1")
    train(adaptation)
    follows = {path for path, m in model.named_modules() if m.training}
    assert follows == {"3.1"} | TRAINED.get(name, set())
    assert torch.equal(model(Z), model(Z))
    now = contents(model)
    kept = [key for key in before if not key.startswith("3.1.") and key in now]
    assert {"1.0.running_mean", "2.mean"} <= set(kept)
    assert all(torch.equal(before[key], now[key]) for key in kept)
    adaptation.remove()
    assert same(contents(model), before)


@FROZEN
def test_the_dropout_inside_a_trained_head_follows(name: str) -> None:
    model = network()
    adapt(model, method(name), example=Z, head="3")
    model.train()
    assert model[3][0].training
    assert not model[1][2].training
    assert not torch.equal(model(Z), model(Z))


EVERY = pytest.mark.parametrize("name", METHODS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
STEPS = {
    "freeze": lambda adaptation: adaptation.freeze(),
    "disable": lambda adaptation: adaptation.disable(),
    "remove": lambda adaptation: adaptation.remove(),
    "freeze and remove": lambda adaptation: (adaptation.freeze(), adaptation.remove()),
    "switch": lambda adaptation: (adaptation.disable(), adaptation.enable()),
}


class Sloped(nn.Module):
    """A learned slope, a shared weight, buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.act = nn.PReLU(6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.tail = nn.SiLU()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.second(self.act(self.norm(self.first(x))))))


def learned(name: str) -> tuple[Sloped, dict[str, Tensor], Adaptation]:
    """A model, what it held, and its trained adaptation."""
    model = Sloped().eval()
    before = contents(model)
    adaptation = adapt(model, method(name), example=Z)
    train(adaptation)
    return model.eval(), before, adaptation


def cast(held: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in held.items()}


@EVERY
@DTYPES
@pytest.mark.parametrize("step", STEPS)
def test_a_model_that_was_cast_goes_on_in_its_dtype(
    name: str, dtype: torch.dtype, step: str
) -> None:
    model, before, adaptation = learned(name)
    expected = model(Z)
    model.to(dtype)
    STEPS[step](adaptation)
    found = model(Z.to(dtype))
    assert found.dtype == dtype
    if adaptation.active:
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
        adaptation.remove()
    assert same(contents(model), cast(before, dtype))


@EVERY
@DTYPES
@pytest.mark.parametrize("merged", [False, True])
def test_what_is_out_follows_a_model_that_is_cast(
    name: str, dtype: torch.dtype, merged: bool
) -> None:
    model, before, adaptation = learned(name)
    if merged:
        adaptation.freeze()
    expected = model(Z)
    adaptation.disable()
    model.to(dtype)
    adaptation.enable()
    found = model(Z.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    if dtype == torch.float64:
        assert all(t.dtype == dtype for t in contents(model).values() if t.is_floating_point())
    adaptation.remove()
    assert same(contents(model), cast(before, dtype))


@EVERY
def test_there_and_back_is_bit_identical_and_copies_nothing(name: str) -> None:
    model, before, adaptation = learned(name)
    for _ in range(2):
        places = {n: p.data_ptr() for n, p in model.named_parameters()}
        expected = model(Z)
        adaptation.disable()
        adaptation.enable()
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
        assert torch.equal(model(Z), expected)
        model.double().float()
        adaptation.freeze()
    adaptation.remove()
    assert same(contents(model), before)


@pytest.mark.parametrize("name", ["linear_probe", "steered_probe", "trainable_ct", "lora"])
def test_the_old_head_follows_to_another_device(name: str) -> None:
    model, before, adaptation = learned(name)
    model.to("meta")
    adaptation.remove()
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(tensor.is_meta for tensor in now.values())
    assert now.keys() >= before.keys()


def test_a_head_of_two_dtypes_keeps_both() -> None:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Mixed()).eval()
    before = contents(model)
    adaptation = adapt(model, method("trainable_ct"), example=Z, head="2")
    assert model[2].linear.weight.dtype == torch.bfloat16
    assert model[2].norm.weight.dtype == torch.float32
    adaptation.remove()
    assert same(contents(model), before)


class Mixed(nn.Module):
    """A normalisation in float32 before a layer in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 3, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).bfloat16()).float()


class Looking(nn.Module):
    """An embedding that rewrites its own weight, inside a bag or not."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.table = kind(12, 6, max_norm=0.5)
        self.middle = nn.Linear(6, 6)
        self.act = nn.ReLU()
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(self.act(self.middle(x if x.ndim == 2 else x.mean(1))))


IDS = torch.arange(12).reshape(4, 3)
KINDS = pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])


@KINDS
def test_looking_for_sites_leaves_a_renormalising_embedding_alone(kind: type[nn.Module]) -> None:
    model = Looking(kind)
    before = contents(model)
    sites(model, IDS)
    assert same(contents(model), before)
    model(IDS)
    assert not same(contents(model), before)


@KINDS
@FROZEN
def test_freezing_a_renormalising_embedding_is_refused(name: str, kind: type[nn.Module]) -> None:
    model = Looking(kind)
    before = contents(model)
    with pytest.raises(FlexureError, match=r"max_norm in 'table'.*max_norm=None"):
        adapt(model, method(name), example=IDS)
    assert same(contents(model), before)
    assert all(p.requires_grad for p in model.parameters())

    expected = copy.deepcopy(model)(IDS)
    layer = model.table
    layer.weight.data = layer.weight.data.renorm(layer.norm_type, 0, layer.max_norm)
    layer.max_norm = None
    torch.testing.assert_close(model(IDS), expected)
    before = contents(model)
    adaptation = adapt(model, method(name), example=IDS)
    F.cross_entropy(model(IDS), torch.arange(4) % 3).backward()
    adaptation.remove()
    assert same(contents(model), before)


def test_a_renormalising_embedding_can_be_finetuned_but_not_made_constant() -> None:
    model = Looking(nn.Embedding)
    before = contents(model)
    adaptation = adapt(model, method("full_finetune"), example=IDS)
    model(IDS)
    with pytest.raises(FlexureError, match="max_norm in 'table'"):
        adaptation.freeze()
    adaptation.enable()
    assert adaptation.parameter_groups()
    adaptation.remove()
    assert same(contents(model), before)
