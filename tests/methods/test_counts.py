"""The table of trainable parameters, without the head, of networks at their full size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import flexure
from flexure.methods.lora import LoRA
from tests.networks import resnet18, resnet50, resnet152, swin_s, swin_t

NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "resnet18": (resnet18, "fc", 64),
    "resnet50": (resnet50, "fc", 64),
    "resnet152": (resnet152, "fc", 64),
    "swin_t": (swin_t, "head", 224),
    "swin_s": (swin_s, "head", 224),
}


def network(name: str) -> tuple[nn.Module, str, int]:
    """The network with zeros for weights, which no count depends on; its head; its image size."""
    make, head, size = NETWORKS[name]
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return model.eval(), head, size


@pytest.mark.parametrize(
    ("name", "where", "count"),
    [
        ("resnet18", None, 35_923),
        ("resnet50", None, 79_443),
        ("resnet152", None, 243_283),
        ("swin_t", None, 74_832),
        ("swin_t", "*.qkv", 17_664),
        ("swin_s", None, 148_560),
        ("swin_s", "*.qkv", 36_096),
    ],
)
def test_lora_of_rank_1(name: str, where: str | None, count: int) -> None:
    model, head, _ = network(name)
    before = [id(p) for p in model.parameters()]
    installed = LoRA(rank=1).install(model, example=None, where=where, axis=None, head=head)
    assert sum(p.numel() for p in installed.parameters.values()) == count
    assert not any(path.startswith(head) for path in installed.structure()["layers"])
    added = [p for p in model.parameters() if id(p) not in before]
    assert sum(p.numel() for p in added) == count
    installed.withdraw()
    assert [id(p) for p in model.parameters()] == before


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 7_808),
        ("resnet50", 45_440),
        ("resnet152", 143_744),
        ("swin_t", 35_328),
        ("swin_s", 72_192),
    ],
)
def test_pairs_of_trainable_ct(name: str, count: int) -> None:
    model, _, size = network(name)
    sites = flexure.sites(model, torch.zeros(1, 3, size, size)).sites
    assert 2 * sum(site.channels or 0 for site in sites) == count


def test_pairs_of_trainable_ct_shared_by_the_calls_of_a_module() -> None:
    model, _, size = network("resnet18")
    sites = flexure.sites(model, torch.zeros(1, 3, size, size)).sites
    shared = {site.modules[0]: site.channels or 0 for site in sites}
    assert 2 * sum(shared.values()) == 3_968
