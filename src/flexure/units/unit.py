"""The unit as a module: one activation of a network, turned into a CTU.

One class serves every activation of the catalogue and every way to hold the dial: shared floats,
or tensors and parameters with one value a channel. The mathematics is in `functional.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from flexure.contracts import SiteError
from flexure.units.catalogue import SPECS, over_axis_one
from flexure.units.functional import check_dial, ctu, follows
from flexure.units.pooling import max_pool_ctu
from flexure.wide import kept_wide

__all__ = ["CTU"]


class CTU(nn.Module):
    """A Curvature Tuning unit in the place of one activation ([CT] eq. 8 and eqs. 5–7).

    ReLU, SiLU, GELU and their kin become CTU(x); LeakyReLU and PReLU become
    slope·x + CTU((1−slope)·x), for slope > 1 its mirror slope·x − CTU(−(1−slope)·x); a rectifier
    capped at m (ReLU6) becomes CTU(x) − CTU(x−m). Each is the activation itself at beta = 1 where
    that activation is piecewise affine.

    Args:
        activation: the catalogue name of the activation that it stands for.
        beta: the dial in [0, 1]: a float, or a `(channels,)` tensor.
        c: the mixture in [0, 1]: a float, a `(channels,)` tensor, or `"balanced"`, which is
            beta²/(1+beta²) and leaves no mean shift.
        params: the activation's own parameters (`slope`, `cap`); a parameter tensor among them
            stays the network's own, under the name `weight`.
        axis: the channel axis, counted from the end; needed where anything is per channel.
        channels: size of that axis.
        inplace: whether it overwrites its input, as the activation did.
        name: the site that it stands for, for error messages.

    Raises:
        FlexureError: beta or c outside [0, 1], or nan.
    """

    beta: float | Tensor
    c: float | Tensor | str
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        activation: str = "relu",
        *,
        beta: float | Tensor,
        c: float | Tensor | str = 0.5,
        params: Mapping[str, Any] | None = None,
        axis: int | None = None,
        channels: int | None = None,
        inplace: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.inplace = inplace
        self.axis = axis
        self.channels = channels
        self.name = name
        self.params = dict(params or {})
        slope = self.params.get("slope")
        if isinstance(slope, nn.Parameter):
            del self.params["slope"]
            self.weight = slope
        # Not persistent: a checkpoint of the plain model must still load, strictly.
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self.dial(beta, c)
        # torch.export lifts buffers in order, and stumbles over a None before a tensor.
        for key in ("scale", "shift"):
            self._buffers[key] = self._buffers.pop(key)

    def dial(self, beta: float | Tensor, c: float | Tensor | str) -> None:
        """Sets beta and c; a calibration made for another dial is dropped."""
        check_dial(beta, c)
        for key, value in (("beta", beta), ("c", c)):
            # A float stays a Python float: no dtype of the model can round it.
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.__dict__.pop(key, None)
                self.register_buffer(key, value)
            else:
                self._buffers.pop(key, None)
                setattr(self, key, value)
        self.scale = self.shift = None

    def correct(self, scale: Tensor, shift: Tensor) -> None:
        """Makes the output scale·phi + shift, `(channels,)` each: a calibration."""
        self.scale, self.shift = scale, shift

    def corrected(self, phi: Tensor) -> Tensor:
        """scale·phi + shift per channel, in phi's dtype."""
        if self.scale is None or self.shift is None:
            return phi
        scale, shift = self._over(self.scale, phi), self._over(self.shift, phi)
        return torch.addcmul(shift, phi.to(shift.dtype), scale).to(phi.dtype)

    def forward(self, input: Tensor, inplace: bool | None = None, **params: Any) -> Tensor:
        """The unit's output, of the input's shape and dtype; the input itself where in place.

        Args:
            input: any shape that has the site's channels on its axis.
            inplace: overrides the unit's own setting, for a routed call.
            params: override the unit's own, for a routed call.

        Raises:
            SiteError: the input has another number of channels than the site had when it was found.
        """
        x = input
        self._check(x)
        inplace = self.inplace if inplace is None else inplace
        params = params or self.params
        y: Tensor = _FORMS[SPECS[self.activation].form](self, x, inplace, params)
        if self.shift is None:
            return y
        return y.copy_(self.corrected(y)) if inplace else self.corrected(y)

    def reference(self, x: Tensor, **params: Any) -> Tensor:
        """The activation that the unit stands for, applied to `x` out of place."""
        original = SPECS[self.activation].reference
        if original is None:
            raise SiteError(f"{self.activation} has no reference: it is not steered")
        params = dict(params or self.params)
        if "weight" in self._parameters:
            params["slope"] = self.weight
        # The functions of the catalogue must not be taken for a call of the network's own.
        with torch._C.DisableTorchFunction():
            return original(x, **params)

    def extra_repr(self) -> str:
        """Activation and dial, as in the site report."""
        beta, c = (
            f"({value.numel()},)" if isinstance(value, Tensor) else value
            for value in (self.beta, self.c)
        )
        calibrated = "" if self.shift is None else ", calibrated"
        return f"{self.activation}, beta={beta}, c={c}{calibrated}"

    def phi(self, x: Tensor, *, inplace: bool = False) -> Tensor:
        """CTU of `x` with the unit's dial, per channel where the dial is."""
        return ctu(x, self._over(self.beta, x), self._over(self.c, x), inplace=inplace)

    def _over(self, value: Any, x: Tensor) -> Any:
        """A dial value shaped to broadcast over `x` along the channel axis."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value.reshape(-1, *(1,) * (-1 - _required(self.axis, self.name)))

    def _check(self, x: Tensor) -> None:
        if self.axis is None or self.channels is None:
            return
        if x.ndim < -self.axis or x.shape[self.axis] != self.channels:
            raise SiteError(
                f"site {self.name!r}: expected {self.channels} channels on axis {self.axis}, got "
                f"an input of shape {tuple(x.shape)}; steer or adapt again with an example of this "
                f"kind (an adapter fits only networks like the one that it was made for)"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CTU:
        # Half precision would distort 1 − beta by 17 % at 0.99: the dial stays float32 or wider.
        with kept_wide(self, {*self._parameters, *self._buffers} - {"weight"}):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _required(axis: int | None, name: str) -> int:
    if axis is None:
        raise SiteError(f"site {name!r}: its channel axis is not known; give axis=")
    return axis


def _rectified(unit: CTU, x: Tensor, inplace: bool, params: Mapping[str, Any]) -> Tensor:
    return unit.phi(x, inplace=inplace)


def _leaky(unit: CTU, x: Tensor, inplace: bool, params: Mapping[str, Any]) -> Tensor:
    slope = unit.weight if "weight" in unit._parameters else params["slope"]
    wide = _wide(x)
    # max(x, slope·x) for slope <= 1, min(x, slope·x) beyond: one mirror image of the other.
    sign: float | Tensor
    if isinstance(slope, Tensor):
        slope = over_axis_one(slope, x).to(wide.dtype)
        sign = torch.where(slope > 1, -1.0, 1.0).to(wide.dtype)
    else:
        sign = -1.0 if slope > 1 else 1.0
    y = (slope * wide + sign * unit.phi(sign * (1 - slope) * wide)).to(x.dtype)
    return x.copy_(y) if inplace else y


def _wide(x: Tensor, *, copy: bool = False) -> Tensor:
    """`x` in float32 or wider, where sums of CTUs are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=copy)


def _capped(unit: CTU, x: Tensor, inplace: bool, params: Mapping[str, Any]) -> Tensor:
    cap = params["cap"]
    if cap is None:
        return unit.phi(x, inplace=inplace)
    # CTU(x) − CTU(x−cap) cancels for large x. It is symmetric about (cap/2, cap/2), since
    # CTU(v) − CTU(−v) = v: the lower half serves both. In place, backward must find the input.
    wide = _wide(x, copy=inplace)
    if follows(wide):  # it sees no branch on values
        y = (unit.phi(wide) - unit.phi(wide - cap)).to(x.dtype)
        return x.copy_(y) if inplace else y
    upper = wide > cap / 2
    v = torch.where(upper, cap - wide, wide)
    half = unit.phi(v) - unit.phi(v - cap)
    y = torch.where(upper, cap - half, half).to(x.dtype)
    return x.copy_(y) if inplace else y


def _pooled(unit: CTU, x: Tensor, inplace: bool, params: Mapping[str, Any]) -> Tensor:
    spatial = _SPATIAL[unit.activation]
    kernel, stride, padding = (
        tuple(value) if isinstance(value, (tuple, list)) else (value,) * spatial
        for value in (params["kernel_size"], params["stride"], params["padding"])
    )
    if not isinstance(unit.beta, Tensor) and unit.beta == 1:
        # The kernel itself: exact in the gradient too, and invisible to function modes.
        pool = getattr(torch.ops.aten, unit.activation).default
        return cast(Tensor, pool(x, kernel, stride, padding, (1,) * spatial, params["ceil_mode"]))
    return max_pool_ctu(
        x,
        unit._over(unit.beta, x),
        unit._over(unit.c, x),
        kernel=kernel,
        stride=stride,
        padding=padding,
        ceil_mode=params["ceil_mode"],
    )


_SPATIAL = {"max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3}

_FORMS: Mapping[str, Callable[[CTU, Tensor, bool, Mapping[str, Any]], Tensor]] = {
    "relu": _rectified,
    "leaky": _leaky,
    "capped": _capped,
    "pool": _pooled,
}
