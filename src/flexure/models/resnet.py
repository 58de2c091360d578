"""CIFAR ResNets (He et al. 2015, arXiv:1512.03385, section 4.2) with shortcut option A.

One activation module per call, so that each can be replaced. Weights are loaded by `sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from flexure.contracts import FlexureError

__all__ = ["DEPTHS", "CifarResNet"]

DEPTHS: Mapping[str, int] = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
"""The depths of the paper, by the names that addresses use."""


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels with (depth - 2) / 6 blocks each.

    Example:
        >>> import torch
        >>> CifarResNet(20)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Attributes:
        linear: the classification layer.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        """Initialised with Kaiming normal weights (the paper's reference 13).

        Args:
            depth: number of layers, 6n + 2.
            num_classes: outputs of `linear`.
            activation: makes one activation module; called once for each activation call.

        Raises:
            FlexureError: a depth that is not 6n + 2, or fewer than one class.
        """
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if blocks < 1 or remainder or num_classes < 1:
            raise FlexureError(
                f"expected a depth of 6n + 2 (20, 32, 44, ...) and at least 1 class, got depth "
                f"{depth} and {num_classes} classes; choose another"
            )
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = activation()
        self.layer1 = _stage(16, 16, blocks, activation)
        self.layer2 = _stage(16, 32, blocks, activation)
        self.layer3 = _stage(32, 64, blocks, activation)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W)` normalised images -> `(B, num_classes)` logits."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (option A)."""

    def __init__(
        self, channels_in: int, channels_out: int, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.widen = channels_out - channels_in
        stride = 2 if self.widen else 1
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        result: Tensor = self.act2(out + self._shortcut(x))
        return result

    def _shortcut(self, x: Tensor) -> Tensor:
        """Identity, or every second pixel with the new channels zero, half on either side."""
        if not self.widen:
            return x
        before = self.widen // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.widen - before))


def _stage(
    channels_in: int, channels_out: int, blocks: int, activation: Callable[[], nn.Module]
) -> nn.Sequential:
    first = _Block(channels_in, channels_out, activation)
    return nn.Sequential(
        first, *(_Block(channels_out, channels_out, activation) for _ in range(blocks - 1))
    )
