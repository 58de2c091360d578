"""ResNets for small images: of He et al. 2015 (arXiv:1512.03385), section 4.2, and wide ones.

`CifarResNet` is the paper's, with shortcut option A; `resnet18` and `resnet34` have the widths and
depths that the paper uses for ImageNet, with a stem for small images and option B, as plain
networks and as low-curvature networks. One activation module per call, so that each can be
replaced. Weights are loaded by `sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from flexure.contracts import FlexureError
from flexure.models.builder import Builder, builder, check_network, check_whole

__all__ = ["DEPTHS", "CifarResNet", "WideResNet", "resnet18", "resnet34"]

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
        check_whole(depth=depth, num_classes=num_classes)
        blocks, remainder = divmod(depth - 2, 6)
        if blocks < 1 or remainder or num_classes < 1:
            raise FlexureError(
                f"expected a depth of 6n + 2 (20, 32, 44, ...) and at least 1 class, got depth "
                f"{depth} and {num_classes} classes; choose another"
            )
        build = Builder(activation)
        self.conv1 = build.conv(3, 16, 3, 32, bias=False)
        self.bn1 = build.norm(16)
        self.act1 = activation()
        self.layer1 = _stage(build, 16, 16, blocks, 32, _pad)
        self.layer2 = _stage(build, 16, 32, blocks, 32, _pad)
        self.layer3 = _stage(build, 32, 64, blocks, 16, _pad)
        self.linear = nn.Linear(64, num_classes)
        build.finish(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W)` normalised images -> `(B, num_classes)` logits."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class WideResNet(nn.Module):
    """Four stages of w, 2w, 4w and 8w channels behind a stem of 3 x 3 without pooling.

    The form in which ResNet-18 and ResNet-34 are used on images of 32 x 32 pixels. Shortcuts are
    option B: 1 x 1 convolutions and a normalisation where shapes change.

    Attributes:
        linear: the classification layer.
    """

    def __init__(
        self, build: Builder, blocks: tuple[int, ...], *, num_classes: int, width: int, size: int
    ) -> None:
        """Made by `resnet18` and `resnet34`; Kaiming normal weights.

        Args:
            build: makes the layers.
            blocks: how many blocks each stage has.
            num_classes: outputs of `linear`.
            width: channels of the first stage.
            size: height and width of the images.
        """
        super().__init__()
        check_network(num_classes, width, size, least=1)
        self.conv1 = build.conv(3, width, 3, size, bias=False)
        self.bn1 = build.norm(width)
        self.act1 = build.activation()
        inside, stages = width, []
        for index, count in enumerate(blocks):
            outside = width * 2**index
            stages.append(_stage(build, inside, outside, count, size, _project))
            inside, size = outside, _halved(size) if index else size
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(inside, num_classes)
        build.finish(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, size, size)` normalised images -> `(B, num_classes)` logits."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def resnet18(
    num_classes: int = 10,
    *,
    lcnn: bool = False,
    width: int = 64,
    input_size: int = 32,
    residual: str | None = None,
    activation: Callable[[], nn.Module] | None = None,
    beta: float | None = None,
    gamma: float | None = None,
) -> WideResNet:
    """ResNet-18 for small images, plain or as a low-curvature network ([LCNN] section 5).

    The LCNN has spectrally normalised convolutions and linear layers, gamma-Lipschitz BatchNorms,
    a centered softplus with its own learnable beta at every call, and residual sums that are
    multiplied by a factor, so that a block's Lipschitz constant is stated.

    Example:
        >>> import torch
        >>> resnet18(width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        num_classes: outputs of `linear`.
        lcnn: whether to build the LCNN rather than its plain twin.
        width: channels of the first stage; 64 is ResNet-18's.
        input_size: height and width of the images, in pixels: a convolution's norm depends on it.
        residual: the LCNN's residual sums: `"mean"` (the default), (a + b)/2; `"sqrt2"`,
            (a + b)/sqrt(2); or `"sum"`, a + b.
        activation: makes one activation module, called once for each activation call; None: ReLU,
            or the LCNN's centered softplus.
        beta: of the LCNN's centered softplus at the start; None: 5, as in the paper.
        gamma: of the LCNN's BatchNorms at the start; None: 10, as in the paper.

    Raises:
        FlexureError: a number below its least value, an unknown `residual`, or `residual`, `beta`
            or `gamma` of a network that has no use for it.
    """
    build = builder(lcnn, activation, residual=residual, beta=beta, gamma=gamma)
    return WideResNet(build, (2, 2, 2, 2), num_classes=num_classes, width=width, size=input_size)


def resnet34(
    num_classes: int = 10,
    *,
    lcnn: bool = False,
    width: int = 64,
    input_size: int = 32,
    residual: str | None = None,
    activation: Callable[[], nn.Module] | None = None,
    beta: float | None = None,
    gamma: float | None = None,
) -> WideResNet:
    """ResNet-34 for small images, plain or as a low-curvature network; arguments as `resnet18`'s.

    Raises:
        FlexureError: as of `resnet18`.
    """
    build = builder(lcnn, activation, residual=residual, beta=beta, gamma=gamma)
    return WideResNet(build, (3, 4, 6, 3), num_classes=num_classes, width=width, size=input_size)


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, build: Builder, inside: int, outside: int, size: int, widen: _Widen) -> None:
        super().__init__()
        wider = outside != inside
        stride = 2 if wider else 1
        self.conv1 = build.conv(inside, outside, 3, size, stride=stride, bias=False)
        self.bn1 = build.norm(outside)
        self.act1 = build.activation()
        after = _halved(size) if wider else size
        self.conv2 = build.conv(outside, outside, 3, after, bias=False)
        self.bn2 = build.norm(outside)
        self.act2 = build.activation()
        self.shortcut = widen(build, inside, outside, size) if wider else nn.Identity()
        self.add = build.add()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        result: Tensor = self.act2(self.add(out, self.shortcut(x)))
        return result


_Widen = Callable[[Builder, int, int, int], nn.Module]
"""From a builder, channels in and out, and the input's size to a block's shortcut."""


class _Padding(nn.Module):
    """Every second pixel, with the new channels zero, half on either side (option A)."""

    def __init__(self, new: int) -> None:
        super().__init__()
        self.new = new

    def forward(self, x: Tensor) -> Tensor:
        before = self.new // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new - before))


def _pad(build: Builder, inside: int, outside: int, size: int) -> nn.Module:
    return _Padding(outside - inside)


def _project(build: Builder, inside: int, outside: int, size: int) -> nn.Module:
    conv = build.conv(inside, outside, 1, size, stride=2, bias=False)
    return nn.Sequential(conv, build.norm(outside))


def _stage(
    build: Builder, inside: int, outside: int, blocks: int, size: int, widen: _Widen
) -> nn.Sequential:
    """Blocks of which the first halves the size if the channels change."""
    first = _Block(build, inside, outside, size, widen)
    size = size if inside == outside else _halved(size)
    rest = (_Block(build, outside, outside, size, widen) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _halved(size: int) -> int:
    return (size + 1) // 2
