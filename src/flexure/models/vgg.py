"""VGG-11 for small images (Simonyan and Zisserman 2014, arXiv:1409.1556, with BatchNorm).

One activation module per call, so that each can be replaced. Weights are loaded by `sources`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from flexure.models.builder import Builder, builder, check_network

__all__ = ["VGG", "vgg11"]

_POOL = 0
_VGG11 = (1, _POOL, 2, _POOL, 4, 4, _POOL, 8, 8, _POOL, 8, 8, _POOL)
"""Channels of each convolution in widths of the first; `_POOL` between the stages."""


class VGG(nn.Module):
    """Convolution, normalisation and activation, over and over; a linear layer on the mean.

    Attributes:
        features: everything but the last layer.
        linear: the classification layer.
    """

    def __init__(
        self, build: Builder, layers: tuple[int, ...], *, num_classes: int, width: int, size: int
    ) -> None:
        """Made by `vgg11`; Kaiming normal weights.

        Args:
            build: makes the layers.
            layers: channels of each convolution in widths, 0 for pooling.
            num_classes: outputs of `linear`.
            width: channels of the first convolution.
            size: height and width of the images.
        """
        super().__init__()
        check_network(num_classes, width, size, least=2 ** layers.count(_POOL))
        inside, features = 3, list[nn.Module]()
        for factor in layers:
            if factor == _POOL:
                features.append(build.pool())
                size //= 2
            else:
                outside = factor * width
                conv = build.conv(inside, outside, 3, size, bias=True)
                features += [conv, build.norm(outside), build.activation()]
                inside = outside
        self.features = nn.Sequential(*features)
        self.linear = nn.Linear(inside, num_classes)
        build.finish(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, size, size)` normalised images -> `(B, num_classes)` logits."""
        logits: Tensor = self.linear(self.features(x).mean(dim=(2, 3)))
        return logits


def vgg11(
    num_classes: int = 10,
    *,
    lcnn: bool = False,
    width: int = 64,
    input_size: int = 32,
    activation: Callable[[], nn.Module] | None = None,
    beta: float | None = None,
    gamma: float | None = None,
) -> VGG:
    """VGG-11 with BatchNorm for small images, plain or as a low-curvature network.

    The plain network pools by maximum; the LCNN by average, since max-pooling has kinks, where no
    bound on curvature holds. The rest is as in `resnet18`.

    Example:
        >>> import torch
        >>> vgg11(width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        num_classes: outputs of `linear`.
        lcnn: whether to build the LCNN rather than its plain twin.
        width: channels of the first convolution; 64 is VGG-11's.
        input_size: height and width of the images, in pixels, at least 32.
        activation: makes one activation module, called once for each activation call; None: ReLU,
            or the LCNN's centered softplus.
        beta: of the LCNN's centered softplus at the start; None: 5, as in the paper.
        gamma: of the LCNN's BatchNorms at the start; None: 10, as in the paper.

    Raises:
        FlexureError: a number below its least value, or `beta` or `gamma` of a network that has
            no use for it.
    """
    build = builder(lcnn, activation, beta=beta, gamma=gamma)
    return VGG(build, _VGG11, num_classes=num_classes, width=width, size=input_size)
