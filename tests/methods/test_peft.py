"""Adaptations of networks that PEFT has put LoRA into: untouched, merged, taken out again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexure
from flexure import TrainableCT
from flexure.contracts import FlexureError
from flexure.surgery.wrapped import unwrapped

peft = pytest.importorskip("peft")


class MLP(nn.Module):
    """A swapped ReLU, a functional one of the root, a module called twice in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)
        self.block = TwiceInBlock()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(F.relu(self.b(self.act(self.a(x))))))


class TwiceInBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act = nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(self.act(x - 0.1)))


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 5, 3, stride=2)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(F.relu(self.norm(self.conv(x)), inplace=True)))
        return self.fc(x.mean((2, 3)))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, hidden_act="relu", num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, hidden_act="relu", num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


# A network, what PEFT gets, one batch, and PEFT's layers.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict, Callable[[], Tensor]]] = {
    "MLP": (MLP, {"target_modules": ["a", "b", "inner"]}, lambda: torch.randn(6, 6)),
    "CNN": (CNN, {"target_modules": ["conv", "second"]}, lambda: torch.randn(6, 3, 9, 9)),
    "BERT": (
        bert,
        {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"},
        lambda: torch.randint(11, (6, 5)),
    ),
    "ViT": (
        vit,
        {"target_modules": r".*\.(q_proj|v_proj|query|value)", "modules_to_save": ["classifier"]},
        lambda: torch.randn(6, 3, 8, 8),
    ),
}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def with_lora(name: str) -> tuple[nn.Module, Tensor]:
    """A PEFT model whose LoRA does something, in eval mode, and a batch."""
    make, settings, data = NETWORKS[name]
    torch.manual_seed(0)
    network = make()
    config = peft.LoraConfig(r=2, lora_dropout=0.1, **settings)
    model = peft.get_peft_model(network, config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.5)
    return model.eval(), data()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output if isinstance(output, Tensor) else output.logits


def train(model: nn.Module, adaptation, x: Tensor, steps: int = 4) -> None:
    optimizer = torch.optim.Adam(adaptation.parameter_groups(1e-2))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(logits(model.train(), x), LABELS).backward()
        optimizer.step()
    model.eval()


def all_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def adapted(model: nn.Module, which: str, x: Tensor):
    subject = model if which == "wrapper" else model.get_base_model()
    return flexure.adapt(subject, TrainableCT(), example=x)


both = pytest.mark.parametrize("which", ["wrapper", "inside"])
every = pytest.mark.parametrize("name", NETWORKS)


@both
@every
def test_training_leaves_the_model_and_its_lora_alone(name, which):
    model, x = with_lora(name)
    state, before = all_of(model), logits(model, x)
    grads = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    adaptation = adapted(model, which, x)
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert not [key for key in trained if "lora" in key]
    train(model, adaptation, x)
    assert not torch.allclose(logits(model, x), before, atol=1e-3)
    adaptation.remove()
    assert same(all_of(model), state)
    assert torch.equal(logits(model, x), before)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == grads


@both
@every
def test_a_merge_keeps_the_trained_units_and_the_head(name, which, tmp_path):
    model, x = with_lora(name)
    plain = copy.deepcopy(model).merge_and_unload()
    before = logits(plain, x)
    adaptation = adapted(model, which, x)
    sites = list(adaptation.betas())
    train(model, adaptation, x)
    learned = logits(model, x)
    merged = model.merge_and_unload().eval()
    assert not [key for key in merged.state_dict() if "lora" in key]
    torch.testing.assert_close(logits(merged, x), learned, rtol=1e-4, atol=1e-5)
    # The units are the merged model's own: they move, train and are found with it.
    inside = {id(parameter) for parameter in merged.parameters()}
    assert all(id(p) in inside for p in adaptation._installed.parameters.values())
    twin = copy.deepcopy(merged).double()
    torch.testing.assert_close(
        logits(twin, x.double() if x.is_floating_point() else x).float(), learned, rtol=1e-4,
        atol=1e-5,
    )  # fmt: skip

    adaptation.save(tmp_path)
    loaded = flexure.load_adapter(plain, tmp_path)
    assert list(loaded.betas()) == sites
    torch.testing.assert_close(logits(plain, x), learned, rtol=1e-4, atol=1e-5)
    loaded.remove()
    assert torch.equal(logits(plain, x), before)

    adaptation.remove()
    torch.testing.assert_close(logits(merged, x), before, rtol=1e-4, atol=1e-5)
    assert not [key for key in merged.state_dict() if "raw" in key or "flexure" in key]


@every
def test_it_goes_on_training_after_the_merge(name):
    model, x = with_lora(name)
    adaptation = adapted(model, "wrapper", x)
    train(model, adaptation, x, steps=1)
    merged = model.merge_and_unload()
    before = adaptation.betas()
    train(merged, adaptation, x, steps=2)
    assert all(not torch.equal(before[site], now) for site, now in adaptation.betas().items())
    adaptation.freeze()
    assert not [key for key, p in merged.named_parameters() if p.requires_grad]


@both
def test_paths_are_those_of_the_network_inside(which):
    model, x = with_lora("MLP")
    subject = model if which == "wrapper" else model.get_base_model()
    assert [site.name for site in flexure.sites(subject, x).sites] == [
        "act", ":1", "block:0", "block:1",
    ]  # fmt: skip
    adaptation = flexure.adapt(subject, TrainableCT(), example=x)
    assert adaptation.model is model.get_base_model()
    assert adaptation.head == "fc"
    with pytest.raises(FlexureError, match="default"):  # one model, whichever way it is named
        flexure.adapt(model, TrainableCT(), example=x)


@pytest.mark.parametrize("head", [None, "fc", "fc.base_layer"])
def test_a_head_that_peft_adapts_is_refused(head):
    torch.manual_seed(0)
    model = peft.get_peft_model(MLP(), peft.LoraConfig(target_modules=["a", "fc"]))
    state = all_of(model)
    with pytest.raises(FlexureError, match="target_modules"):
        flexure.adapt(model, TrainableCT(), example=torch.randn(2, 6), head=head)
    assert same(all_of(model), state)


def test_the_head_has_its_plain_path_however_it_is_named():
    for head in (None, "classifier", "classifier.modules_to_save.default"):
        model, x = with_lora("ViT")
        assert flexure.adapt(model, TrainableCT(), example=x, head=head).head == "classifier"


def test_disabling_and_peft_own_switches():
    model, x = with_lora("MLP")
    before = logits(model, x)
    with model.disable_adapter():
        bare = logits(model, x)
    adaptation = adapted(model, "wrapper", x)
    train(model, adaptation, x)
    learned = logits(model, x)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, x), learned, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, x), learned, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    with adaptation.disable():
        torch.testing.assert_close(logits(model, x), before, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model, x), bare, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model, x), learned, rtol=1e-4, atol=1e-5)


def test_both_are_trained_on_request():
    model, x = with_lora("CNN")
    adaptation = adapted(model, "wrapper", x)
    own = {key: p for key, p in model.named_parameters() if "lora_" in key}
    before = {key: p.detach().clone() for key, p in own.items()}
    for parameter in own.values():
        parameter.requires_grad_(True)
    groups = [*adaptation.parameter_groups(), {"params": list(own.values()), "lr": 1e-2}]
    optimizer = torch.optim.Adam(groups)
    betas = adaptation.betas()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), LABELS).backward()
        optimizer.step()
    assert not [key for key, p in own.items() if torch.equal(p, before[key])]
    assert all(not torch.equal(betas[site], now) for site, now in adaptation.betas().items())
    learned = logits(model, x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, x), learned, rtol=1e-4, atol=1e-5)


def test_steering_survives_the_merge_too(tmp_path):
    model, x = with_lora("MLP")
    plain = copy.deepcopy(model).merge_and_unload()
    before = logits(plain, x)
    steering = flexure.steer(model, beta=0.6, example=x)
    steered = logits(model, x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, x), steered, rtol=1e-4, atol=1e-5)
    assert isinstance(merged.flexure, nn.ModuleDict)
    steering.save(tmp_path)
    with flexure.load_adapter(plain, tmp_path):
        torch.testing.assert_close(logits(plain, x), steered, rtol=1e-4, atol=1e-5)
    steering.remove()
    torch.testing.assert_close(logits(merged, x), before, rtol=1e-4, atol=1e-5)


def test_what_is_inside():
    network = MLP()
    assert unwrapped(network) is network
    model = peft.get_peft_model(network, peft.LoraConfig(target_modules=["a"]))
    assert unwrapped(model) is network
    assert unwrapped(model.base_model) is network
    mixed = peft.get_peft_model(MLP(), peft.LoraConfig(target_modules=["a"]), mixed=True)
    assert isinstance(unwrapped(mixed), MLP)
