"""The census and steering on real architectures, built from tiny random configurations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flexure.methods.steer import steer
from flexure.surgery import sites

transformers = pytest.importorskip("transformers")


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (2, 7))}


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}

# name: model class, config class, config, example, (activation, axis, channels) of each site
MODELS = {
    "ResNet": (
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        _image, [("relu", -3, 8)] * 3 + [("relu", -3, 16)] * 4,
    ),
    "ResNet bottleneck": (
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "layer_type": "bottleneck"},
        _image, [("relu", -3, 8), ("relu", -3, 4), ("relu", -3, 4), ("relu", -3, 16)],
    ),
    "Swin": (
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
         "window_size": 4, "hidden_act": "relu"},
        _image, [("relu", -1, 32), ("relu", -1, 64)],
    ),
    "ViT": (
        "ViTForImageClassification", "ViTConfig",
        {**SMALL, "intermediate_size": 24, "image_size": 32, "patch_size": 8},
        _image, [("gelu_erf", -1, 24)] * 2,
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 1.0},
        _image, [("gelu_erf", -1, 32), ("gelu_erf", -1, 64)],
    ),
    "BERT": (
        "BertForSequenceClassification", "BertConfig",
        {**SMALL, "intermediate_size": 24, "vocab_size": 50},
        _tokens, [("gelu_erf", -1, 24)] * 2,
    ),
    "GPT-2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50},
        _tokens, [("gelu_tanh", -1, 64)] * 2,
    ),
    "Llama": (
        "LlamaForCausalLM", "LlamaConfig",
        {**SMALL, "intermediate_size": 24, "vocab_size": 50},
        _tokens, [("silu", -1, 24)] * 2,
    ),
    "Mamba": (
        "MambaForCausalLM", "MambaConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4},
        _tokens, [("silu", -2, 32), ("softplus", -2, 32), ("silu", -2, 32)] * 2,
    ),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model_class, config_class, settings, example, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)(config).eval()
    return model, example()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_sites_and_steering(name: str) -> None:
    model, example = build(name)
    report = sites(model, example)
    assert [(s.activation, s.axis, s.channels) for s in report.sites] == MODELS[name][4]
    assert not any(refusal.blocking for refusal in report.refused)
    plain = model(**example).logits
    with steer(model, beta=0.6, example=example, calibration=[example]) as steering:
        assert not torch.equal(model(**example).logits, plain)
        for site in report.sites:
            assert steering.units[site.name].shift.shape == (site.channels,)
    assert torch.equal(model(**example).logits, plain)


@pytest.mark.parametrize("name", ["ResNet", "Swin", "Llama"])
@torch.no_grad()
def test_exact_where_the_report_says_so(name: str) -> None:
    model, example = build(name)
    plain = model(**example).logits
    points = {site.name: site.point for site in sites(model, example).sites}
    beta = {name: point.beta for name, point in points.items()}
    c = {name: 0.5 if point.c is None else point.c for name, point in points.items()}
    with steer(model, beta=beta, c=c, example=example):
        torch.testing.assert_close(model(**example).logits, plain)


def test_gradient_checkpointing_of_transformers() -> None:
    model, example = build("BERT")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    labels = torch.tensor([0, 1])
    grads = []
    with steer(model, beta=0.7, example=example):
        for checkpointing in (False, True):
            model.zero_grad()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(**example, labels=labels).loss.backward()
            grads.append(model.bert.embeddings.word_embeddings.weight.grad.clone())
    torch.testing.assert_close(*grads)
