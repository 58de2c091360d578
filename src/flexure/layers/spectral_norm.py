"""Spectral normalisation of layers: W -> W/σ(W), σ the norm of the layer's whole operator.

A parametrization of the weights of Linear, convolutions and transposed convolutions. How singular
vectors are found is in `layer_operator.py`; bounds of weights that are given are in `spectral.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.utils import parametrize

from flexure.contracts import FlexureError, is_number
from flexure.layers.geometry import Sizes
from flexure.layers.layer_operator import LayerOperator, Triple, plain, plainly, scaled
from flexure.layers.norm_memory import Memory
from flexure.layers.of_module import module_norm_bounds

__all__ = ["SpectralNorm", "spectral_norm", "spectral_norms"]

EVERY = 10
"""Changes of a weight between refreshes of the singular vectors in training mode, at most."""

LAG, CALM = 0.01, 0.003
"""Growth of the norm in a refresh above which the next comes sooner; below which, later."""

PRODUCTS = 8
"""Products with AᵀA of such a refresh."""

TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-7}
"""Of the norm's square in eval mode, by the dtype that is computed in."""

TOLERANCE = 1e-4
"""In any other: half of it in the norm."""

VECTORS = 2**25
"""Entries of Lanczos vectors at most: 128 MiB of float32."""

LOST = 0.8
"""Share of σ/‖W‖ that ⟨G, W⟩/‖W‖ keeps between refreshes; below, the weight is another one."""

JUMP = 0.1
"""Growth of the norm in one refresh after which there is another, and one at the next change."""

SETTLED = 1e-3
"""That below which refreshing ends where the weight or the input size is another one."""


def spectral_norm(
    module: nn.Module, *, input_size: Sizes | None = None, every: int = EVERY
) -> nn.Module:
    """Divides the weight of a layer by the l2 norm of the layer's operator, from now on.

    W/σ(W) in place of W (Miyato et al. 2018; for the operator of a convolution, Ryu et al. 2019):
    the layer's norm is 1, whatever its weight. The operator maps the whole input of one sample to
    its whole output, with the layer's stride, padding, padding mode, dilation and groups.

    In training mode σ is ⟨G, W⟩ with G = d(uᵀA(W)v)/dW, for unit vectors u and v that a few
    Lanczos steps improve now and then: never above the norm, so that the layer's norm is 1 or a
    little more. They are improved at every change of the weight at first. Where that raised σ by
    less than 0.3 %, twice as many changes may pass before the next time, `every` at most; where by
    more than 1 %, half as many. So the norm is within a few percent of 1 while the weight changes
    no faster than it did before, and nothing bounds it where that is suddenly otherwise. In eval
    mode σ is converged to 5e-5 (float64: 5e-8) of itself, whenever the
    weight's values are not those that it was last converged for. Both depend on the weight, the
    state dict and the input size alone; measures that lend the layer a float64 copy of its weight
    get the σ of its own precision.

    Inputs of another spatial size than `input_size` are noticed by a forward pre-hook, and the
    layer is normalised for theirs; a layer that is called at several sizes in turn is slow to
    train, since u and v are improved at every call, and one that several threads call at several
    sizes at once may be normalised for another's. A weight of zeros stays zero. In half precision
    the quotient is rounded to the weight's dtype: its norm is 1 only to that dtype's precision.
    `torch.nn.utils.parametrize.remove_parametrizations(module, "weight")` puts the quotient in the
    weight's place; call it in eval mode.

    Args:
        module: a Linear, Conv1d/2d/3d or ConvTranspose1d/2d/3d, which is changed.
        input_size: the spatial size of its inputs (a number stands for all axes); none for Linear.
        every: changes of the weight between refreshes of u and v in training mode, at most.

    Returns:
        `module`.

    Raises:
        FlexureError: another layer, one that is normalised already, a weight that is not finite or
            computed by a hook, `every` no whole number of at least 1, or an `input_size` that is
            missing or does not fit.
    """
    if spectral_norm_of(module) is not None:
        raise FlexureError(
            f"expected a layer that is not normalised, got {type(module).__name__} which is; "
            f"remove_parametrizations(layer, 'weight') undoes it"
        )
    if not (is_number(every) and isinstance(every, Integral) and every >= 1):
        raise FlexureError(
            f"expected every to be a whole number >= 1, got {every!r}; give 1 to refresh at each "
            f"change"
        )
    norm = SpectralNorm(module, input_size=input_size, every=every)
    parametrize.register_parametrization(module, "weight", norm, unsafe=True)
    norm.train(module.training)
    hooks: Any = module._forward_pre_hooks
    if not any(isinstance(hook, _NoteSize) for hook in hooks.values()):
        module.register_forward_pre_hook(_NoteSize(), with_kwargs=True)
    return module


def spectral_norms(model: nn.Module) -> dict[str, SpectralNorm]:
    """The normalisations in a model, by the path of the layer."""
    found = {path: spectral_norm_of(module) for path, module in model.named_modules()}
    return {path: norm for path, norm in found.items() if norm is not None}


def spectral_norm_of(module: nn.Module) -> SpectralNorm | None:
    """The normalisation of one layer's weight, if it has one."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    steps: Any = module.parametrizations.weight  # type: ignore[union-attr]
    return next((step for step in steps if isinstance(step, SpectralNorm)), None)


class SpectralNorm(nn.Module):
    """The parametrization W -> W/σ(W); made by `spectral_norm`.

    Attributes:
        size: spatial size of the inputs that the layer is normalised for.
        every: changes of the weight between refreshes of u and v in training mode, at most.
        v: `(1, *input)`, the right singular vector of training mode.
        direction: of the weight's shape, G; σ = ⟨G, W⟩ in training mode.
        trained_norm: 0-d, ⟨G, W⟩ when the weight last changed in training mode.
        share: 0-d, ⟨G, W⟩/‖W‖ when G was found, ‖W‖ the mean of the absolute values.
        age: 0-d int64, changes of the weight in training mode since v was refreshed.
        interval: 0-d int64, changes between refreshes as it is now.
    """

    v: Tensor
    direction: Tensor
    trained_norm: Tensor
    share: Tensor
    age: Tensor
    interval: Tensor

    def __init__(self, layer: nn.Module, *, input_size: Sizes | None, every: int) -> None:
        super().__init__()
        self._operator = LayerOperator(layer)
        self.every = every
        self.size = self._operator.checked_size(input_size)
        self._memory = Memory()
        weight: Tensor = layer.weight  # type: ignore[assignment]
        shape = self._operator.input_shape(self.size)
        drawn_by = torch.Generator().manual_seed(0)
        v = torch.randn(shape, generator=drawn_by, dtype=torch.float64)
        self.register_buffer("v", (v / v.norm()).to(weight.device, weight.dtype))
        self.register_buffer("direction", torch.zeros_like(weight, requires_grad=False))
        for name in ("trained_norm", "share"):
            self.register_buffer(name, weight.new_zeros((), requires_grad=False))
        for name, start in (("age", 0), ("interval", 1)):
            count = torch.full((), start, dtype=torch.int64, device=weight.device)
            self.register_buffer(name, count)
        self._own_dtype = weight.dtype
        if not weight.is_meta:
            with plainly():
                self._store(self._converged(plain(weight), self.size), plain(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """W/⟨G, W⟩; a weight of zeros as it is."""
        compiling = torch.compiler.is_compiling()
        return _divided(weight, self._uncompiled(weight) if compiling else self._current(weight))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store where `weight` is assigned: itself."""
        return weight

    @property
    def norm(self) -> Tensor:
        """0-d, without a graph: what the weight is divided by now."""
        weight = self._weight()
        with torch.no_grad():
            return _paired(self._current(weight), weight)

    def certified(self) -> float:
        """An upper bound of the norm of the layer as it is now, never below it (Gram iteration).

        In eval mode the norm itself is 1. The bound is above it by the looseness that
        `conv_norm_bound` tells of; the layer's input has the spatial size `size`.

        Raises:
            FlexureError: the weight is not finite.
        """
        layer = self._operator.layer
        shape = self._operator.input_shape(self.size)[1:]
        with torch.no_grad(), plainly():
            return module_norm_bounds(layer, shape).spectral

    def _weight(self) -> Tensor:
        """The weight that is to be normalised."""
        steps = self._operator.layer.parametrizations.weight
        weight: Tensor = steps.original
        for step in steps:
            if step is self:
                break
            weight = step(weight)
        return weight

    def _current(self, weight: Tensor) -> Tensor:
        """G for the weight, training mode or eval."""
        size = self.size  # once: another thread may call the layer on another
        with plainly():
            values = plain(weight)
            if not self.training:
                return self._remembered(values, size)
            self._train(values, size)
            # Graphs keep a copy: the next refresh writes into the buffer.
            return self.direction.clone()

    @_disable_dynamo
    def _uncompiled(self, weight: Tensor) -> Tensor:
        """`_current`, which a compiler leaves as it is; nothing is imported before it is called."""
        return self._current(weight)

    def _remembered(self, weight: Tensor, size: tuple[int, ...]) -> Tensor:
        """G converged for the weight's values."""
        with torch._C.DisableTorchFunction():  # measures, which compute in float64 inside
            own = self._unlent(weight)
            direction = self._memory.find(own, size)
            if direction is None:
                direction = self._converged(own, size).direction
                self._memory.keep(own, size, direction)
            return direction.to(weight.dtype)

    def _unlent(self, weight: Tensor) -> Tensor:
        """The layer's own weight where it is lent a wider copy: σ is the same in both precisions.

        A layer that is cast to another dtype has its weights in that one from then on.
        """
        own = weight.to(self._own_dtype)
        wider = torch.promote_types(own.dtype, weight.dtype) == weight.dtype
        return own if wider and torch.equal(own.to(weight.dtype), weight) else weight

    def _converged(self, weight: Tensor, size: tuple[int, ...]) -> Triple:
        """The triple of the weight, divided by a number that keeps squares finite."""
        if not bool(weight.isfinite().all()):
            raise FlexureError(
                f"expected a finite weight to normalise in {self._operator.layer!r}, got nan or "
                f"inf; check the training, or load weights that are finite"
            )
        wide = scaled(weight.to(_computed_in(weight)))
        tol = TOLERANCES.get(weight.dtype, TOLERANCE)
        start = self._start(wide, size)
        triple = self._operator.converged(wide, start, tol=tol, vectors=VECTORS)
        if not bool(_paired(triple.direction, weight).isfinite()):
            raise FlexureError(
                f"expected a weight whose operator norm is finite in {weight.dtype} in "
                f"{self._operator.layer!r}, got entries up to {float(weight.abs().max()):.3g}; "
                f"scale the weight down"
            )
        return triple

    def _start(self, weight: Tensor, size: tuple[int, ...]) -> Tensor:
        """The vector of training mode, cropped or padded with zeros to a size."""
        v = self.v.to(weight)
        if v.shape[2:] == size:
            return v
        ends = [new - old for new, old in zip(size, v.shape[2:], strict=True)]
        return F.pad(v, [width for end in reversed(ends) for width in (0, end)])

    def _train(self, weight: Tensor, size: tuple[int, ...]) -> None:
        """Notes a change of the weight, and refreshes when it is time.

        What is done depends on the buffers and the weight's values alone, never on what else tells
        of changes (versions do not tell of those through `.data`), so that a training that is
        interrupted, or put back, goes on as it would have.
        """
        resized = self.v.shape[2:] != size
        norm = _paired(self.direction, weight).to(self.trained_norm)
        lost = norm <= LOST * self.share * _mean_size(weight)
        flags = torch.stack([norm != self.trained_norm, self.age + 1 >= self.interval, lost])
        changed, due, is_lost = flags.tolist()  # at once: another device is waited for
        if changed:
            self.age.add_(1)
            self.trained_norm.copy_(norm)
            self._memory.clear()
        if (changed and due) or is_lost or resized:
            self._refresh(weight, size, settle=is_lost or resized)

    def _refresh(self, weight: Tensor, size: tuple[int, ...], *, settle: bool) -> None:
        """Improves u and v; `settle`: until the norm hardly grows any more."""
        wide = scaled(weight.to(_narrow(weight)))
        triple = self._operator.improved(wide, self._start(wide, size), products=PRODUCTS)
        first = before = float(_paired(self.direction, wide))
        now = float(triple.norm)
        while settle or now > (1 + JUMP) * before > 0:
            triple = self._operator.improved(wide, triple.v, products=PRODUCTS)
            before, now = now, float(triple.norm)
            settle = now > (1 + SETTLED) * before
        if self.v.shape == triple.v.shape:
            self._pace(first, now)
        self._store(triple, weight)

    def _pace(self, before: float, now: float) -> None:
        """How long to wait for the next refresh, after one that raised the norm so much."""
        interval = int(self.interval)
        if now > (1 + JUMP) * before:
            interval = 1
        elif now > (1 + LAG) * before:
            interval = max(1, interval // 2)
        elif now < (1 + CALM) * before:
            interval = min(self.every, 2 * interval)
        self.interval.fill_(interval)

    def _store(self, triple: Triple, weight: Tensor) -> None:
        """Takes a triple for training mode, unless it is not finite."""
        norm = float(triple.norm)
        if not math.isfinite(norm):
            return
        if self.v.shape != triple.v.shape:
            self.v = torch.empty_like(triple.v, dtype=self.v.dtype)
        self.v.copy_(triple.v)
        self.direction.copy_(triple.direction)
        norm_now = _paired(self.direction, weight)
        self.trained_norm.copy_(norm_now)
        size = _mean_size(weight)
        self.share.copy_(torch.where(size > 0, norm_now / size, 0.0))
        # A weight of zeros has no direction: its first change needs one.
        self.age.fill_(0 if norm > 0 else self.every)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralNorm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._own_dtype = self.direction.dtype
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        v = state_dict.get(prefix + "v")
        if v is not None and v.shape != self.v.shape and v.shape[:2] == self.v.shape[:2]:
            self.v = self.v.new_zeros(v.shape)
            self.size = tuple(v.shape[2:])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._own_dtype = self.direction.dtype  # load_state_dict(assign=True) may change it

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered of this very object's weight."""
        return {**self.__dict__, "_memory": Memory()}

    def extra_repr(self) -> str:
        """What it was made with."""
        return f"size={self.size}, every={self.every}"


class _NoteSize:
    """A forward pre-hook that tells the normalisation how large the inputs are."""

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        norm = spectral_norm_of(layer)
        x = args[0] if args else kwargs.get("input")
        if norm is None or not norm.size or not isinstance(x, Tensor):
            return
        if (args[1:] and args[1] is not None) or kwargs.get("output_size") is not None:
            raise FlexureError(
                "expected a transposed convolution that is called without output_size, which "
                "changes its norm; give the layer an output_padding"
            )
        size = tuple(x.shape[-len(norm.size) :])
        if size != norm.size:
            norm.size = size


def _divided(weight: Tensor, direction: Tensor) -> Tensor:
    norm = _paired(direction, weight)
    return (weight / torch.where(norm == 0, 1.0, norm)).to(weight.dtype)


def _paired(direction: Tensor, weight: Tensor) -> Tensor:
    """⟨G, W⟩, in float32 at least."""
    wide = _narrow(weight)
    return (direction.to(wide) * weight.to(wide)).sum()


def _mean_size(weight: Tensor) -> Tensor:
    """The mean of the absolute values: no square overflows."""
    wide = _narrow(weight)
    total: Tensor = torch.linalg.vector_norm(weight, 1, dtype=wide)
    return total / max(1, weight.numel())


def _narrow(weight: Tensor) -> torch.dtype:
    """The dtype of training mode: the weight's, float32 at least."""
    return torch.promote_types(weight.dtype, torch.float32)


def _computed_in(weight: Tensor) -> torch.dtype:
    """The dtype to converge in: float64 on CUDA, where float32 may be convolved in 11 bits."""
    return torch.float64 if weight.device.type == "cuda" else _narrow(weight)
