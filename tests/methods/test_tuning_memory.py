"""What a step of each arm keeps for backward, on torchvision's ResNet-18 at batch 8, 224x224."""

from __future__ import annotations

import pytest
import torch
from benchmarks.tuning import FULL, LORA, METHODS, MIB, OURS, PUBLISHED, Arm

from flexure.memory import saved_bytes
from tests.networks import resnet18, resnet50


def kept(name: str, network, batch: int, size: int) -> float:
    """MiB that autograd keeps, parameters and buffers excluded."""
    x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    arm = Arm(name, network, x, y)
    own = [*arm.model.parameters(), *arm.model.buffers(), y]
    return saved_bytes(arm.loss, exclude=own) / MIB


def test_resnet18_at_full_size():
    network = resnet18()
    found = {name: kept(name, network, 8, 224) for name in (OURS, FULL, PUBLISHED)}
    # The counter agrees with what was measured before there was this library.
    assert found[PUBLISHED] == pytest.approx(538, abs=1)
    assert found[FULL] == pytest.approx(169, abs=1)
    assert found[OURS] <= 160


def test_what_a_unit_keeps_is_its_input():
    """Sites: 1 at the stem, 4 a stage. Besides: the max-pooling's int32 indices."""
    width, size = 8, 64
    planes = [width * (size // 2) ** 2] + 4 * [
        width * 2**stage * (size // 4 // 2**stage) ** 2 for stage in range(4)
    ]
    pooled = width * (size // 4) ** 2
    bytes_an_image = 4 * sum(planes) + 4 * pooled
    found = kept(OURS, resnet18(width), 4, size) * MIB / 4
    dials = 17 * 6 * 64 * 8  # a few tensors of one value a channel, at most 64 channels
    assert bytes_an_image <= found <= bytes_an_image + dials


@pytest.mark.parametrize("network", [resnet18, resnet50])
def test_ours_keeps_less_than_its_rivals(network):
    found = {name: kept(name, network(16), 2, 64) for name in (*METHODS, PUBLISHED)}
    assert found[OURS] < min(found[LORA], found[FULL], found[PUBLISHED] / 3)
    assert found["probe"] < 0.1
