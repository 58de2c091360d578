"""The unit with a trainable (beta, c) a channel, as Trainable CT installs it.

How raw parameters become dials is in `parameterization.py`; what the unit computes, in `unit.py`.
Where units go, what is frozen around them and how they are trained is decided above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexure.contracts import FlexureError, SiteError
from flexure.units.functional import balanced_c, check_dial
from flexure.units.parameterization import DEFAULT, find_parameterization, saturated_share
from flexure.units.unit import CTU

__all__ = ["TrainableCTU", "learned_saturation"]


class TrainableCTU(CTU):
    """A Curvature Tuning unit whose dials are learned, one pair a channel (Trainable CT, [CT]).

    The parameters are `raw_beta` and `raw_c`, `(channels,)` float32 whatever dtype the model is
    cast to, except float64; `beta` and `c` are computed from them at each use. A network's own
    parameter, such as PReLU's `weight`, is the unit's too, and stays the network's.

    Args:
        activation: the catalogue name of the activation that it stands for.
        parameterization: a row of `PARAMETERIZATIONS`.
        init_beta: where beta starts: a number, or one a channel, `(channels,)`. Default as
            published.
        init_c: where c starts, likewise, or `"balanced"`. Default as published.
        channels: size of the channel axis.
        axis: the channel axis, counted from the end.
        params: the activation's own parameters, as in `CTU`.
        inplace: whether it overwrites its input, as the activation did.
        name: the site that it stands for, for error messages.

    Raises:
        FlexureError: a start outside [0, 1]; one of another shape; or one that no gradient leaves:
            beta = 1, where the unit is ReLU and its derivative in beta is exactly 0, and both ends
            of a parameterization that reaches them only at infinity.
        SiteError: the channel axis is not known.
    """

    raw_beta: nn.Parameter
    raw_c: nn.Parameter

    def __init__(
        self,
        activation: str = "relu",
        *,
        parameterization: str = DEFAULT,
        init_beta: float | Tensor = 0.8,
        init_c: float | Tensor | str = 0.5,
        channels: int | None,
        axis: int | None,
        params: Mapping[str, Any] | None = None,
        inplace: bool = False,
        name: str = "",
    ) -> None:
        if channels is None or axis is None:
            raise SiteError(f"site {name!r}: its channel axis is not known; give axis=")
        # The base class dials at its end, and dialling needs this.
        self.parameterization = find_parameterization(parameterization).name
        super().__init__(
            activation,
            beta=init_beta,
            c=init_c,
            params=params,
            axis=axis,
            channels=channels,
            inplace=inplace,
            name=name,
        )
        for key, raw in (("init_beta", self.raw_beta), ("init_c", self.raw_c)):
            self._check_start(key, raw)

    @property
    def beta(self) -> Tensor:  # type: ignore[override]
        """`(channels,)`, in [0, 1], with its graph to `raw_beta`."""
        return find_parameterization(self.parameterization).to_value(self.raw_beta)

    @property
    def c(self) -> Tensor:  # type: ignore[override]
        """`(channels,)`, in [0, 1], with its graph to `raw_c`."""
        return find_parameterization(self.parameterization).to_value(self.raw_c)

    def dial(self, beta: float | Tensor, c: float | Tensor | str) -> None:
        """Sets beta and c, in the parameters that there are; a calibration is dropped.

        Every value of [0, 1] is taken, also those that training cannot leave.

        Raises:
            FlexureError: a value outside [0, 1], or not one a channel.
        """
        check_dial(beta, c)
        mixture = balanced_c(beta) if isinstance(c, str) else c
        to_raw = find_parameterization(self.parameterization).to_raw
        values = {"raw_beta": self._spread("beta", beta), "raw_c": self._spread("c", mixture)}
        for key, value in values.items():
            held = self._parameters.get(key)
            if held is None:
                self.register_parameter(key, nn.Parameter(to_raw(value).float()))
            else:
                with torch.no_grad():
                    held.copy_(to_raw(value))
        self.scale = self.shift = None

    def frozen(self) -> CTU:
        """The same unit with the values learned so far as constants: it has no dial to train.

        It gives the same output bit by bit, keeps calibration and mode, and exports.
        """
        params = dict(self.params)
        if "weight" in self._parameters:
            params["slope"] = self.weight
        unit = CTU(
            self.activation,
            beta=self.beta.detach().clone(),
            c=self.c.detach().clone(),
            params=params,
            axis=self.axis,
            channels=self.channels,
            inplace=self.inplace,
            name=self.name,
        )
        unit.scale, unit.shift = self.scale, self.shift
        return unit.train(self.training)

    def extra_repr(self) -> str:
        """As of any unit, with the parameterization."""
        return f"{super().extra_repr()}, {self.parameterization}"

    def _spread(self, key: str, value: float | Tensor) -> Tensor:
        """A dial as `(channels,)`, in its own dtype or float32."""
        if not isinstance(value, Tensor):
            return torch.full((self.channels or 0,), value, dtype=torch.float32)
        value = value.detach()
        if value.numel() != 1 and value.shape != (self.channels,):
            raise FlexureError(
                f"site {self.name!r}: expected {key} to be a number or a tensor of shape "
                f"({self.channels},), got {tuple(value.shape)}; give one value a channel"
            )
        return value.reshape(-1).expand(self.channels or 0)

    def _check_start(self, key: str, raw: nn.Parameter) -> None:
        """A start must have somewhere to go."""
        with torch.enable_grad():
            free = raw.detach().requires_grad_()
            value = find_parameterization(self.parameterization).to_value(free)
            (slope,) = torch.autograd.grad(value.sum(), free)
        stuck = (slope == 0) | ~slope.isfinite()
        if raw is self.raw_beta:
            stuck = stuck | (value == 1)
        if bool(stuck.any()):
            worst = float(value.detach()[stuck][0])
            raise FlexureError(
                f"site {self.name!r}: expected {key} where training can move it, got {worst:g}, "
                f"where the gradient is exactly 0 ({self.parameterization}); start inside, for "
                "example at 0.99"
            )


def learned_saturation(model: nn.Module) -> float | None:
    """The saturated share of the dials that a network learns; None where it learns none.

    Args:
        model: a network with units in place.
    """
    units = [module for module in model.modules() if isinstance(module, TrainableCTU)]
    if not units:
        return None
    with torch.no_grad():
        return saturated_share(*(dial for unit in units for dial in (unit.beta, unit.c)))
