"""LoRA as a method: which layers, what a file holds, and other people's networks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.contracts import AdaptationMethod, AdapterError, FlexureError, SiteError
from flexure.methods.lora import InstalledLoRA, Layers, LoRA
from tests.networks import Swin, resnet18


def place(
    model: nn.Module, method: LoRA | None = None, *, where: Layers = None, head: str | None = "head"
) -> InstalledLoRA:
    method = method or LoRA(rank=2)
    return method.install(model, example=None, where=where, axis=None, head=head)


def learn(installed: InstalledLoRA) -> None:
    for parameter in installed.parameters.values():
        nn.init.normal_(parameter, std=0.2)


class Small(nn.Module):
    def __init__(self, middle: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, middle, 3), nn.ReLU(), nn.Flatten())
        self.last = nn.Linear(middle * 4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.body(self.first(x))))


X = torch.linspace(-1, 1, 2 * 2 * 4 * 4).reshape(2, 2, 4, 4)


def test_it_is_a_method() -> None:
    method: AdaptationMethod = LoRA()
    assert (method.name, method.freezes) == ("lora", True)
    assert asdict(LoRA()) == {"rank": 1, "alpha": 1.0, "where": None, "learning_rate": 1e-3}
    assert LoRA(where=["a", "b"]) == LoRA(**json.loads(json.dumps(asdict(LoRA(where=("a", "b"))))))
    assert hash(LoRA(where=["a"])) == hash(LoRA(where=("a",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank"),
        ({"rank": 1.0}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": "1"}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": "x"}, "alpha"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"where": 3}, "where"),
        ({"where": ["a", 3]}, "where"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexureError, match=message):
        LoRA(**settings)


def test_parameters_have_the_names_of_the_model() -> None:
    model = Small()
    installed = place(model)
    assert set(installed.structure()["layers"]) == {"first", "body.0", "last"}
    for name, parameter in installed.parameters.items():
        assert model.get_parameter(name) is parameter
    assert [p.shape for p in installed.parameters.values()][:2] == [(2, 18), (4, 2)]
    assert dict(installed.betas()) == dict(installed.cs()) == {}


def test_the_model_starts_unchanged_and_learns() -> None:
    model = Small().requires_grad_(False)
    before = model(X)
    installed = place(model)
    assert torch.equal(model(X), before)
    optimizer = torch.optim.Adam(installed.parameters.values(), lr=0.05)
    target = before + 1
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    installed.withdraw()
    assert torch.equal(model(X), before)


def test_rank_0_is_the_probe() -> None:
    model = Small()
    classes = [type(module) for module in model.modules()]
    installed = place(model, LoRA(rank=0))
    assert dict(installed.parameters) == dict(installed.tensors()) == {}
    assert [type(module) for module in model.modules()] == classes
    structure = json.loads(json.dumps(installed.structure()))
    assert dict(LoRA(rank=0).load(Small(), structure, {}).parameters) == {}


def test_a_rank_above_that_of_the_weight_is_allowed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3))
    learn(place(model, LoRA(rank=5), head=None))
    assert model(torch.ones(1, 3, 2, 2)).shape == (1, 3, 2, 2)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, ["first", "body.0", "last"]),
        ("body.*", ["body.0"]),
        (["last", "f*"], ["first", "last"]),
        (lambda path, module: isinstance(module, nn.Linear), ["last"]),
    ],
)
@pytest.mark.parametrize("in_method", [False, True])
def test_where(where: Layers, expected: list[str], in_method: bool) -> None:
    method = LoRA(where=where) if in_method else LoRA()
    installed = place(Small(), method, where=None if in_method else where)
    assert list(installed.structure()["layers"]) == expected
    assert installed.structure()["complete"] == (where is None)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["last", "qkv"], r"'qkv' matches no layer.*first, body.0, last"),
        ("head.0", r"'head.0' matches no layer outside the head 'head'"),
        ("body.1", "'body.1' matches no layer"),
        ([], "chose none of first"),
        (lambda path, module: False, "chose none of first"),
    ],
)
def test_where_that_names_no_layer(where: Layers, message: str) -> None:
    model = Small()
    with pytest.raises(SiteError, match=message):
        place(model, where=where)
    assert type(model.last) is nn.Linear


def test_where_given_twice() -> None:
    with pytest.raises(SiteError, match="given twice"):
        place(Small(), LoRA(where="last"), where="first")


def test_a_model_without_layers() -> None:
    with pytest.raises(SiteError, match="expected linear layers or convolutions"):
        place(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), head="1")


def test_a_layer_that_cannot_be_changed_can_be_left_out() -> None:
    model = Small()
    nn.utils.parametrizations.weight_norm(model.last)
    with pytest.raises(SiteError, match="'last'"):
        place(model)
    assert type(model.first) is nn.Conv2d
    place(model, where=["first", "body.0"])


def test_a_head_tied_to_the_body_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with pytest.raises(SiteError, match="'0' shares its weight with '2'"):
        place(model, head="2")


def test_freezing_keeps_the_values_and_can_be_withdrawn() -> None:
    model = Small().requires_grad_(False)
    before = model(X)
    installed = place(model)
    learn(installed)
    changed, tensors = model(X).detach(), dict(installed.tensors())
    structure = installed.structure()
    installed.freeze()
    assert dict(installed.parameters) == {}
    assert torch.equal(model(X), changed)
    assert not any("low_rank" in name for name in model.state_dict())
    assert installed.structure() == structure
    assert all(torch.equal(installed.tensors()[name], tensors[name]) for name in tensors)
    installed.withdraw()
    assert torch.equal(model(X), before)
    installed.insert()
    assert torch.equal(model(X), changed)


def stored(installed: InstalledLoRA) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What comes back from a file; JSON may come back in another order."""
    structure = json.loads(json.dumps(installed.structure(), sort_keys=True))
    return structure, {name: tensor.clone() for name, tensor in installed.tensors().items()}


@pytest.mark.parametrize("where", [None, ["first", "last"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loading_restores_bit_by_bit(where: Layers, dtype: torch.dtype) -> None:
    model = Small().to(dtype)
    other = copy.deepcopy(model)
    installed = place(model, LoRA(rank=2, alpha=3), where=where)
    learn(installed)
    state = torch.get_rng_state()
    loaded = LoRA(rank=2, alpha=3).load(other, *stored(installed))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(other(X.to(dtype)), model(X.to(dtype)))
    assert loaded.structure() == installed.structure()
    assert loaded.parameters.keys() == installed.parameters.keys()
    assert all(p.requires_grad for p in loaded.parameters.values())
    loaded.withdraw()
    installed.withdraw()
    assert torch.equal(other(X.to(dtype)), model(X.to(dtype)))


def test_loading_tied_layers() -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        # In the file, "b" comes before the layer whose factors it uses.
        model = nn.Sequential()
        model.add_module("z", nn.Linear(3, 3))
        model.add_module("b", nn.Linear(3, 3))
        model.b.weight = model.z.weight
        return model

    model, other = make(), make()
    installed = place(model, head=None)
    learn(installed)
    LoRA(rank=2).load(other, *stored(installed))
    x = torch.randn(2, 3)
    assert torch.equal(other(x), model(x))
    untied = make()
    untied.b.weight = nn.Parameter(untied.b.weight.detach().clone())
    with pytest.raises(AdapterError, match=r"missing layers: b \(linear \(3, 3\) tied to z; "):
        LoRA(rank=2).load(untied, *stored(installed))


def wider(model: nn.Module) -> nn.Module:
    return Small(middle=8)


def without(model: nn.Module) -> nn.Module:
    model.first = nn.Identity()
    return model


def with_more(model: nn.Module) -> nn.Module:
    model.body.append(nn.Linear(16, 16))
    return model


def of_another_kind(model: nn.Module) -> nn.Module:
    model.first = nn.ConvTranspose2d(4, 2, 3)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"missing layers: body.0 \(conv2d \(4, 4, 3, 3\); the model's is conv2d \(8, 4,"),
        (wider, r"last \(linear \(4, 16\); the model's is linear \(4, 32\)\)\nunexpected.*none"),
        (without, r"missing layers: first \(conv2d \(4, 2, 3, 3\)\)\n"),
        (of_another_kind, r"first \(conv2d .*; the model's is conv_transpose2d"),
        (with_more, r"missing layers: none\nunexpected layers: body.3 \(linear \(16, 16\)\)"),
    ],
)
def test_loading_onto_another_model(change: Callable[[nn.Module], nn.Module], message: str) -> None:
    model = change(Small())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(AdapterError, match=message):
        LoRA(rank=2).load(model, *stored(place(Small())))
    assert [type(module) for module in model.modules()] == classes


def test_more_layers_are_no_matter_where_some_were_chosen() -> None:
    model = with_more(Small())
    LoRA(rank=2).load(model, *stored(place(Small(), where=["first", "last"])))
    assert type(model.body[3]) is nn.Linear


def test_another_head_is_no_matter() -> None:
    model = Small()
    model.head = nn.Linear(4, 7)
    LoRA(rank=2).load(model, *stored(place(Small())))
    assert type(model.head) is nn.Linear
    del model.head
    with pytest.raises(AdapterError, match="head belongs at 'head'"):
        LoRA(rank=2).load(model, *stored(place(Small())))


@pytest.mark.parametrize("rank", [1, 3])
def test_loading_with_another_rank(rank: int) -> None:
    with pytest.raises(AdapterError, match=r"first\.low_rank\.A to be numbers of shape"):
        LoRA(rank=rank).load(Small(), *stored(place(Small())))


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (None, "lack last.low_rank.B"),
        (torch.zeros(4, 3), r"shape \(4, 2\), got torch.float32 of \(4, 3\)"),
        (torch.zeros(4, 2, dtype=torch.int32), "int32"),
        (torch.full((4, 2), torch.nan), "not finite"),
    ],
)
def test_damaged_tensors(replacement: Tensor | None, message: str) -> None:
    structure, tensors = stored(place(Small()))
    tensors.pop("last.low_rank.B")
    if replacement is not None:
        tensors["last.low_rank.B"] = replacement
    model = Small()
    with pytest.raises(AdapterError, match=message):
        LoRA(rank=2).load(model, structure, tensors)
    assert type(model.last) is nn.Linear


@pytest.mark.parametrize(
    "damage",
    [
        lambda structure: structure.pop("layers"),
        lambda structure: structure.update(layers=[1]),
        lambda structure: structure["layers"]["last"].pop("kind"),
        lambda structure: structure["layers"]["last"].update(shape="abc"),
        lambda structure: structure.pop("head"),
    ],
)
def test_damaged_structures(damage: Callable[[dict[str, Any]], Any]) -> None:
    structure, tensors = stored(place(Small()))
    damage(structure)
    with pytest.raises(AdapterError, match="structure is damaged"):
        LoRA(rank=2).load(Small(), structure, tensors)


def test_loading_onto_an_adapted_model() -> None:
    model = Small()
    installed = place(model)
    with pytest.raises(AdapterError, match="already"):
        LoRA(rank=2).load(model, *stored(installed))
    installed.withdraw()
    assert type(model.last) is nn.Linear


def test_networks_that_use_weights_without_calling_their_layer() -> None:
    """Nothing of LoRA on a Swin stays without a gradient."""
    model = Swin(depths=(1, 1)).eval().requires_grad_(False)
    installed = place(model)
    assert "features.0.qkv" in installed.structure()["layers"]
    learn(installed)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    without_gradient = [
        n for n, p in installed.parameters.items() if p.grad is None or not p.grad.any()
    ]
    assert without_gradient == []


def tiny(name: str) -> tuple[nn.Module, dict[str, Tensor], str, str]:
    """A network of transformers with random weights, its input, head, and one layer of its."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"input_ids": torch.arange(10).reshape(2, 5)}
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2)
        return (
            transformers.GPT2LMHeadModel(config),
            tokens,
            "lm_head",
            "transformer.h.1.attn.c_attn",
        )
    if name == "bert":
        config = transformers.BertConfig(vocab_size=20, intermediate_size=32, **small)
        model = transformers.BertForMaskedLM(config)
        return model, tokens, "cls.predictions.decoder", "bert.encoder.layer.0.attention.self.query"
    if name == "vit":
        config = transformers.ViTConfig(
            image_size=16, patch_size=8, intermediate_size=32, num_labels=3, **small
        )
        model = transformers.ViTForImageClassification(config)
        return model, images, "classifier", "vit.embeddings.patch_embeddings.projection"
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    )
    model = transformers.SwinForImageClassification(config)
    return model, images, "classifier", "swin.encoder.layers.0.downsample.reduction"


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "swin"])
def test_transformers(name: str) -> None:
    model, inputs, head, layer = tiny(name)
    model.eval().requires_grad_(False)
    before = model(**inputs).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    installed = place(model, head=head)
    assert layer in installed.structure()["layers"]
    assert torch.equal(model(**inputs).logits, before)
    learn(installed)
    changed = model(**inputs).logits
    assert not torch.allclose(changed, before, atol=1e-4)
    changed.square().sum().backward()
    idle = {n for n, p in installed.parameters.items() if p.grad is None}
    assert idle == set()
    other = tiny(name)[0].eval()
    other.load_state_dict(state)
    loaded = LoRA(rank=2).load(other, *stored(installed))
    torch.testing.assert_close(other(**inputs).logits, changed)
    for key, tensor in loaded.tensors().items():
        assert torch.equal(tensor, installed.tensors()[key])
    installed.withdraw()
    assert torch.equal(model(**inputs).logits, before)


def test_bert_with_its_tied_decoder_inside_is_refused() -> None:
    model, *_ = tiny("bert")
    with pytest.raises(SiteError, match=r"decoder' shares its weight with 'bert\.embeddings\.word"):
        place(model, head=None)


def test_a_resnet_adapts_beside_its_head() -> None:
    model = resnet18(4).eval()
    installed = place(model, head="fc")
    assert len(installed.structure()["layers"]) == 20
    assert type(model.fc) is nn.Linear


def test_through_adapt_trained_switched_stored_and_frozen(tmp_path: Path) -> None:
    model = Swin(depths=(1, 1)).eval()
    other, x = copy.deepcopy(model), torch.randn(6, 3, 8, 8)
    labels = torch.arange(6) % 3
    before = model(x)
    adaptation = flexure.adapt(model, LoRA(rank=2), example=x, classes=3)
    model.train()
    optimizer = torch.optim.Adam(adaptation.parameter_groups())
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        assert adaptation.check_gradients()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = model(x).detach()
    adaptation.save(tmp_path)
    loaded = flexure.load_adapter(other, tmp_path)
    assert torch.equal(other(x), changed)
    assert loaded.count == adaptation.count == 904
    with adaptation.disable():
        assert torch.equal(model(x), before)
    adaptation.freeze()
    assert torch.equal(model(x), changed)
    assert not any(p.requires_grad for p in model.parameters())
    adaptation.remove()
    assert torch.equal(model(x), before)


def test_the_seed_of_adapt_draws_the_factors() -> None:
    def first(seed: int) -> Tensor:
        model = Small()
        flexure.adapt(model, LoRA(), example=X, head="head.1", seed=seed)
        return model.first.low_rank.A.detach()

    torch.manual_seed(1)
    drawn = first(3)
    torch.manual_seed(2)
    assert torch.equal(drawn, first(3))
    assert not torch.equal(drawn, first(4))


def test_rank_0_and_the_probe_train_the_same() -> None:
    trained = []
    for method in (LoRA(rank=0), flexure.LinearProbe()):
        torch.manual_seed(0)
        model = Small()
        adaptation = flexure.adapt(model, method, example=X, head="head.1")
        optimizer = torch.optim.Adam(adaptation.parameter_groups())
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
        assert adaptation.count == 0
        trained.append(model(X).detach())
    assert torch.equal(*trained)
