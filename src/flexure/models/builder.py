"""What our convolutional networks are built of: plain layers, or those of low-curvature networks.

A network asks its builder for every layer, and says where they go; `resnet` and `vgg` hold the
networks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from flexure.contracts import FlexureError
from flexure.layers import LipschitzBatchNorm, spectral_norm
from flexure.layers.residual import ResidualSum
from flexure.units import CenteredSoftplus

__all__ = [
    "RESIDUAL_FACTORS",
    "Builder",
    "FlatBuilder",
    "builder",
    "check_constants",
    "check_network",
    "check_whole",
]

RESIDUAL_FACTORS: Mapping[str, float] = {"sum": 1.0, "mean": 0.5, "sqrt2": 1 / math.sqrt(2)}
"""What a residual sum of an LCNN is multiplied by.

Of two branches with Lipschitz constants L and M, the sum's is at most `factor * (L + M)`: with
`mean` it is 1 where both are 1, with `sqrt2` it is the square root of 2, with `sum` it is 2.
"""


class Builder:
    """Plain layers: convolution, BatchNorm, an activation, a + b, max-pooling."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        """Args:
        activation: makes one activation module; called once for each activation call.
        """
        self.activation = activation
        self.sizes: dict[nn.Module, int] = {}

    def conv(
        self, inside: int, outside: int, kernel: int, size: int, *, stride: int = 1, bias: bool
    ) -> nn.Conv2d:
        """A convolution, padded to keep the size at stride 1.

        Args:
            inside: channels of the input.
            outside: channels of the output.
            kernel: height and width of the kernel, odd.
            size: height and width of the input.
            stride: of the kernel.
            bias: whether there is one.
        """
        conv = nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=bias)
        self.sizes[conv] = size
        return conv

    def norm(self, channels: int) -> nn.Module:
        """Normalisation after a convolution."""
        return nn.BatchNorm2d(channels)

    def add(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What joins the two branches of a residual block."""
        return operator.add

    def pool(self) -> nn.Module:
        """Pooling of 2 x 2 pixels."""
        return nn.MaxPool2d(2)

    def finish(self, model: nn.Module) -> None:
        """Kaiming normal weights for every convolution and linear layer (He et al. 2015)."""
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)


class FlatBuilder(Builder):
    """Layers of low-curvature networks ([LCNN] section 3), every linear one of norm 1.

    Pooling is by average: max-pooling has kinks, where no bound on curvature holds.
    """

    def __init__(
        self,
        activation: Callable[[], nn.Module] | None,
        *,
        beta: float,
        gamma: float,
        factor: float,
    ) -> None:
        """Args:
        activation: as of `Builder`; None: centered softplus with a learnable `beta`.
        beta: its value at the start.
        gamma: the BatchNorms' Lipschitz constant at the start.
        factor: what residual sums are multiplied by.
        """
        super().__init__(activation or (lambda: CenteredSoftplus(beta)))
        self.gamma = gamma
        self.factor = factor

    def norm(self, channels: int) -> nn.Module:
        """BatchNorm whose Lipschitz constant is at most gamma."""
        return LipschitzBatchNorm(channels, gamma=self.gamma)

    def add(self) -> Callable[[Tensor, Tensor], Tensor]:
        """`factor * (a + b)`."""
        return ResidualSum(self.factor)

    def pool(self) -> nn.Module:
        """Average pooling of 2 x 2 pixels."""
        return nn.AvgPool2d(2)

    def finish(self, model: nn.Module) -> None:
        """Initialises, then normalises every convolution and linear layer."""
        super().finish(model)
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for layer in layers:
            size = self.sizes.get(layer)
            spectral_norm(layer, input_size=None if size is None else (size, size))


def builder(
    lcnn: bool,
    activation: Callable[[], nn.Module] | None,
    *,
    residual: str | None = None,
    beta: float | None = None,
    gamma: float | None = None,
) -> Builder:
    """The builder of a plain network, or of an LCNN.

    Args:
        lcnn: which of the two.
        activation: makes one activation module; None: ReLU, or an LCNN's centered softplus.
        residual: a key of `RESIDUAL_FACTORS`, of an LCNN; None: `"mean"`.
        beta: of an LCNN's centered softplus at the start; None: 5.
        gamma: of an LCNN's BatchNorms at the start; None: 10.

    Raises:
        FlexureError: an unknown `residual`, beta <= 0, gamma < 1, or one of them not finite; one
            of them for a plain network, or beta for an activation of one's own; an `lcnn` that is
            no bool; an `activation` that makes no modules.
    """
    _check_kind(lcnn, activation)
    residual_ = "mean" if residual is None else residual
    beta_, gamma_ = 5.0 if beta is None else beta, 10.0 if gamma is None else gamma
    if residual_ not in tuple(RESIDUAL_FACTORS):
        raise FlexureError(
            f"expected residual to be one of {', '.join(map(repr, RESIDUAL_FACTORS))}, got "
            f"{residual!r}; choose one of them"
        )
    check_constants(beta_, gamma_)
    if not lcnn:
        _check_none("with lcnn=True", "a plain network", residual=residual, beta=beta, gamma=gamma)
        return Builder(activation or nn.ReLU)
    if activation is not None:
        _check_none("with centered softplus", "an activation of its own", beta=beta)
    return FlatBuilder(activation, beta=beta_, gamma=gamma_, factor=RESIDUAL_FACTORS[residual_])


def check_constants(beta: float, gamma: float) -> None:
    """Makes sure that beta and gamma can start an LCNN.

    Raises:
        FlexureError: beta <= 0, gamma < 1, or one of them not finite or no number.
    """
    if not _is_number(beta) or not 0 < beta < math.inf:
        raise FlexureError(
            f"expected beta to be a positive and finite number, got {beta!r}; the paper starts at 5"
        )
    if not _is_number(gamma) or not 1 <= gamma < math.inf:
        raise FlexureError(
            f"expected gamma to be a finite number of at least 1, got {gamma!r}; the paper starts "
            f"at 10"
        )


def check_network(num_classes: int, width: int, input_size: int, least: int) -> None:
    """Makes sure that a network of these sizes exists.

    Args:
        num_classes: outputs.
        width: channels of the first layer.
        input_size: height and width of the images.
        least: the smallest of these that the network takes.

    Raises:
        FlexureError: one of them is too small, or no whole number.
    """
    check_whole(num_classes=num_classes, width=width, input_size=input_size)
    if num_classes < 1 or width < 1 or input_size < least:
        raise FlexureError(
            f"expected at least 1 class, 1 channel and {least} x {least} pixels, got "
            f"num_classes={num_classes}, width={width} and input_size={input_size}; choose larger"
        )


def check_whole(**numbers: Any) -> None:
    """Makes sure that arguments, by their names, are whole numbers.

    Raises:
        FlexureError: one is not.
    """
    for name, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise FlexureError(f"expected {name} to be a whole number, got {value!r}; give an int")


def _check_kind(lcnn: Any, activation: Any) -> None:
    if not isinstance(lcnn, bool):
        raise FlexureError(f"expected lcnn to be True or False, got {lcnn!r}; choose one of them")
    if activation is not None and not callable(activation):
        raise FlexureError(
            f"expected activation to make a module when it is called, got {activation!r}; give a "
            f"class, such as nn.ReLU"
        )


def _check_none(where: str, got: str, **settings: Any) -> None:
    given = [f"{name}=" for name, value in settings.items() if value is not None]
    if given:
        raise FlexureError(
            f"expected {', '.join(given)} {where}, got {got}, which has no use for it; drop it"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
