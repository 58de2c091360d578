"""The linear operator of a layer: its products with vectors, and its largest singular triple.

The operator maps the whole input of one sample to its whole output, the bias left out. Products
are the layer's own forward function with any weight; transposes and derivatives are autograd's.
What is made of them is in `spectral_norm.py`; certified bounds are in `spectral.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.utils import parametrize

from flexure.batched import lanczos
from flexure.contracts import FlexureError
from flexure.layers.geometry import Sizes, per_axis
from flexure.layers.spectral import power_of_two

__all__ = ["LAYERS", "LayerOperator", "Triple", "plain", "plainly", "scaled"]


@dataclass(frozen=True)
class Triple:
    """A value that the operator's norm is not below, and where it is taken.

    Attributes:
        norm: 0-d, uᵀA(W)v for unit vectors u and v.
        v: `(1, *input)`, the unit vector v.
        direction: of the weight's shape, G = d(uᵀA(W)v)/dW: uᵀA(W)v = ⟨G, W⟩ for every W.
        converged: whether `norm` is known to be the operator's norm.
    """

    norm: Tensor
    v: Tensor
    direction: Tensor
    converged: bool = False


@dataclass(frozen=True)
class LayerOperator:
    """The operator that a layer is with one weight or another.

    Attributes:
        layer: an instance of one of `LAYERS`.
    """

    layer: Any

    def __post_init__(self) -> None:
        """Checks the layer.

        Raises:
            FlexureError: it is none of `LAYERS`, changes their forward, has no values yet, or gets
                its weight from a hook.
        """
        if self._kind is None:
            known = ", ".join(cls.__name__ for cls in LAYERS)
            raise FlexureError(
                f"expected a layer that is linear in its input ({known}, or a subclass that keeps "
                f"the forward), got {type(self.layer).__name__}; normalise the layers inside it"
            )
        held = {**self.layer._parameters, **self.layer._buffers}
        if held.get("weight") is None and not parametrize.is_parametrized(self.layer, "weight"):
            raise FlexureError(
                f"expected a layer whose weight is a parameter, got {type(self.layer).__name__}: "
                f"its weight is computed by a hook; remove_spectral_norm / remove_weight_norm "
                f"(torch.nn.utils) first"
            )
        weight = self.layer.weight
        if nn.parameter.is_lazy(weight) or not weight.is_floating_point():
            raise FlexureError(
                f"expected a weight of real floating-point values, got "
                f"{'none yet' if nn.parameter.is_lazy(weight) else weight.dtype}; call a lazy "
                f"layer once before it is normalised"
            )

    @property
    def _kind(self) -> type[nn.Module] | None:
        own = type(self.layer).forward
        return next((c for c in LAYERS if isinstance(self.layer, c) and own is c.forward), None)

    @property
    def spatial(self) -> int:
        """The number of spatial axes."""
        return max(0, int(self.layer.weight.dim()) - 2)

    def checked_size(self, input_size: Sizes | None) -> tuple[int, ...]:
        """The spatial size of an input, one number an axis.

        Raises:
            FlexureError: it is missing, or no input of the layer.
        """
        name, axes = type(self.layer).__name__, self.spatial
        if not axes and input_size is None:
            return ()
        if input_size is None:
            raise FlexureError(
                f"expected input_size, the spatial size of the inputs of {name}, got none: the "
                f"norm of a convolution depends on it; give {axes} numbers"
            )
        size = per_axis("input_size", input_size, axes) if axes else None
        if size is None:
            raise FlexureError(
                f"expected no input_size for {name}, whose norm does not depend on it, got "
                f"{input_size}; leave it out"
            )
        weight = self.layer.weight.detach().to("meta")
        try:
            self.apply(weight, torch.empty(self.input_shape(size), device="meta").to(weight.dtype))
        except RuntimeError as error:
            raise FlexureError(
                f"expected an input_size that {name} accepts, got {size}: "
                f"{str(error).splitlines()[0]}; give the size of the layer's real inputs"
            ) from error
        return size

    def input_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Of one input, as a batch of one."""
        layer = self.layer
        channels = layer.in_channels if self.spatial else layer.in_features
        return (1, channels, *size)

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """A(W) x for every sample."""
        kind = self._kind
        if kind is None:  # pragma: no cover - checked when made
            raise FlexureError(f"expected one of LAYERS, got {type(self.layer).__name__}")
        return LAYERS[kind](self.layer, weight, x)

    def improved(self, weight: Tensor, v: Tensor, *, products: int) -> Triple:
        """The best triple of the Krylov space of v: a few Lanczos steps on AᵀA, one exchange.

        As many power iterations would cost the same and find a new singular vector far later.
        Where Av is zero, the triple is zero, with v as it was.

        Args:
            weight: W, plain (see `plain`); call it inside `plainly`.
            v: `(1, *input)`, a unit vector, in the weight's dtype.
            products: with AᵀA.
        """
        basis, images = _unit(v).flatten()[None], []
        for _ in range(min(products, v.numel())):
            image = self.squared(weight, basis[-1].view_as(v)).flatten()
            images.append(image)
            rest = image
            for _ in range(2):
                rest = rest - (basis @ rest) @ basis
            basis = torch.cat([basis, _unit(rest)[None]])
        # Another device is asked once, whatever the number of products.
        inside = (basis[:-1] @ torch.stack(images).mT).cpu().double()
        if bool(inside.isfinite().all()):
            values, vectors = torch.linalg.eigh((inside + inside.mT) / 2)
            best = _unit((vectors[:, -1].to(basis) @ basis[:-1]).view_as(v))
            v = best if float(values[-1]) > 0 else v
        return self.triple(weight, v)

    def squared(self, weight: Tensor, v: Tensor) -> Tensor:
        """AᵀA v."""
        x = v.detach().requires_grad_()
        image = self.apply(weight.detach(), x)
        return torch.autograd.grad(image, x, image.detach())[0]

    def triple(self, weight: Tensor, v: Tensor, *, converged: bool = False) -> Triple:
        """That of v and u = Av/‖Av‖."""
        w = weight.detach().requires_grad_()
        image = self.apply(w, v)
        (direction,) = torch.autograd.grad(image, w, _unit(image.detach()))
        return Triple((direction * weight).sum(), v, direction, converged)

    def converged(self, weight: Tensor, v: Tensor, *, tol: float, vectors: int) -> Triple:
        """The largest singular triple, by the Lanczos method on AᵀA.

        Args:
            weight: as in `improved`.
            v: `(1, *input)`, where to start, in the weight's dtype.
            tol: as in `batched.lanczos`, relative to the norm's square.
            vectors: entries of vectors held at most; the method is restarted beyond.
        """
        drawn_by = torch.Generator().manual_seed(0)
        length = max(_SHORTEST, min(_LONGEST, vectors // max(1, v.numel())))

        def product(x: Tensor, rows: Tensor) -> Tensor:
            return self.squared(weight, x)

        for _ in range(_RESTARTS):
            random = torch.randn(v.shape, generator=drawn_by, dtype=torch.float64)
            start = _unit(v) + 0.1 * _unit(random).to(v)
            spectrum = lanczos(product, start, tol=tol, max_products=length)
            if not bool(spectrum.norm.isfinite()):
                break
            v = spectrum.vector
            if bool(spectrum.converged):
                break
        return self.triple(weight, v, converged=bool(spectrum.converged))


_SHORTEST, _LONGEST, _RESTARTS = 20, 300, 8
"""Products between restarts, and how often the Lanczos method is run at most."""


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, autograd records, as if no transform, autocast or checkpoint was around."""
    with ExitStack() as stack:
        autograd: Any = torch._C._autograd
        if autograd._saved_tensors_hooks_is_enabled():  # transforms allow none
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _same(saved: Any) -> Any:
    return saved


def plain(weight: Tensor) -> Tensor:
    """The values of a weight without a graph, out of what transforms have wrapped it in.

    Raises:
        FlexureError: it is a batch of weights, mapped over by vmap.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(weight):
        if torch._C._functorch.is_batchedtensor(weight):
            raise FlexureError(
                "expected one weight, got a batch of them: spectral normalisation cannot be "
                "mapped over weights by vmap; loop over the models"
            )
        weight = torch._C._functorch.get_unwrapped(weight)
    return weight.clone() if weight.is_inference() else weight.detach()


def scaled(weight: Tensor) -> Tensor:
    """With entries of at most about 1, so that squares stay finite; the same singular vectors."""
    limits = torch.finfo(weight.dtype)
    divisor = min(max(power_of_two(weight), limits.tiny), limits.max / 2)
    return torch.div(weight, divisor)


def _unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x)
    return x / torch.where(norm > 0, norm, 1.0)


def _convolved(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    out: Tensor = layer._conv_forward(x, weight, None)
    return out


def _transposed(function: Callable[..., Tensor]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    def convolved(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
        settings = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        return function(x, weight, None, *settings)

    return convolved


LAYERS: Mapping[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: lambda layer, weight, x: F.linear(x, weight),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolved),
    nn.ConvTranspose1d: _transposed(F.conv_transpose1d),
    nn.ConvTranspose2d: _transposed(F.conv_transpose2d),
    nn.ConvTranspose3d: _transposed(F.conv_transpose3d),
}
"""The layers that have an operator: class -> its forward function (layer, weight, input)."""
