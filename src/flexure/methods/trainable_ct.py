"""Trainable CT: a pair (beta, c) for every channel of every activation, weights frozen ([CT]).

How a raw parameter becomes a dial is `units/parameterization.py`'s; freezing, the head, names and
files are `adapt.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flexure.contracts import FlexureError, SiteError
from flexure.methods.placing import Maker, UnitMethod
from flexure.methods.settings import check_positive
from flexure.surgery.sites import Site
from flexure.units.functional import check_dial
from flexure.units.parameterization import DEFAULT, find_parameterization
from flexure.units.trainable import TrainableCTU
from flexure.units.unit import CTU

__all__ = ["TrainableCT"]


@dataclass(frozen=True)
class TrainableCT(UnitMethod):
    """A trainable pair (beta, c) for every channel of every activation site ([CT] section 3.3).

    Attributes:
        share: one unit for each activation module, as published, instead of one for each call.
        parameterization: how the raw parameters become dials, a row of
            `flexure.units.parameterization`; `"sigmoid"` is the published one.
        init_beta: where every beta starts; as published.
        init_c: where every c starts; as published.
        learning_rate: for the raw parameters, with Adam; None takes the parameterization's.

    Raises:
        FlexureError: a value out of range, or an unknown parameterization.
    """

    name: ClassVar[str] = "trainable_ct"
    freezes: ClassVar[bool] = True

    share: bool = False
    parameterization: str = DEFAULT
    init_beta: float = 0.8
    init_c: float = 0.5
    learning_rate: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not isinstance(self.share, bool):
            raise FlexureError(f"expected share to be True or False, got {self.share!r}")
        row = find_parameterization(self.parameterization)
        check_dial(self.init_beta, self.init_c)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", row.learning_rate)
        check_positive("learning_rate", self.learning_rate)

    @property
    def optimizer_settings(self) -> Mapping[str, float]:
        """What its parameter group sets besides the rate: Adam's `eps`."""
        return {"eps": find_parameterization(self.parameterization).epsilon}

    def maker(self, chosen: tuple[Site, ...]) -> Maker:
        """Units with dials of their own, or one for each module with `share`.

        Raises:
            SiteError: a channel axis is not known, or, with `share`, calls of one module differ in
                their channels.
        """
        _check_channels(chosen)
        shared: dict[str, CTU] = {}
        if self.share:
            _check_shareable(chosen)

        def make(site: Site, arguments: dict[str, Any]) -> CTU:
            key = _module_of(site) if self.share else site.name
            if key not in shared:
                shared[key] = TrainableCTU(
                    **arguments,
                    parameterization=self.parameterization,
                    init_beta=self.init_beta,
                    init_c=self.init_c,
                )
            return shared[key]

        return make


def _check_channels(chosen: tuple[Site, ...]) -> None:
    unknown = [site.name for site in chosen if site.axis is None or site.channels is None]
    if unknown:
        raise SiteError(
            f"expected sites with a known channel axis, got {', '.join(unknown)}, where the layer "
            f"that feeds them does not tell it; give axis=, a number or {{site: axis}}, or leave "
            f"them out with where="
        )


def _module_of(site: Site) -> str:
    """What the sites of one module have in common; a function's site has a unit of its own."""
    return site.modules[0] if site.modules else site.name


def _check_shareable(chosen: tuple[Site, ...]) -> None:
    first: dict[str, Site] = {}
    for site in chosen:
        one = first.setdefault(_module_of(site), site)
        if (one.axis, one.channels) != (site.axis, site.channels):
            raise SiteError(
                f"share=True: expected all calls of {_module_of(site)!r} to have the same "
                f"channels, got {one.channels} on axis {one.axis} at {one.name} and "
                f"{site.channels} on axis {site.axis} at {site.name}; use share=False"
            )
