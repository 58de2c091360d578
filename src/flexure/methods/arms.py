"""The arms of a comparison: which methods take part, and which settings of each are tried.

Choosing among the settings and training them is `tune`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias

from flexure.contracts import AdaptationMethod, FlexureError
from flexure.methods.baselines import FullFinetune, LinearProbe, SteeredProbe
from flexure.methods.lora import LoRA
from flexure.methods.trainable_ct import TrainableCT
from flexure.record import to_json

__all__ = ["ARMS", "PROBE", "RATE_FACTORS", "Arm", "Arms", "Trial", "arms_of"]

PROBE = "probe"
"""The arm that every other one is compared with; always there."""

RATE_FACTORS: tuple[float, ...] = (1.0, 0.3, 3.0, 10.0)
"""Factors on a method's own learning rate, the preferred one of equals first."""

_STEERED_BETAS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Tried from the front; beta = 1, which is the probe on a ReLU network, first."""

_CT_BETAS = (0.8, 0.5)  # the paper's, and one whose units bend from the start
_CT_FACTORS = (1.0, 3.0, 0.3, 10.0, 0.1, 30.0)  # on Trainable CT's own rate
_LARGEST_RATE = 1e30  # single precision must hold ten times as much: Adam's first step


_OF_ACTIVATIONS = frozenset({SteeredProbe.name, TrainableCT.name})

Settings: TypeAlias = "Callable[[int], Sequence[AdaptationMethod]]"
"""Number of settings to try -> those, or as many as there are."""

Arms: TypeAlias = (
    "Sequence[str] | Mapping[str, AdaptationMethod | Sequence[AdaptationMethod] | Settings] | None"
)
"""Names of `ARMS`, or methods by a name of one's own; None for all of `ARMS`.

One method is tried at several learning rates, if it has one; several methods are tried as given;
of a function of the number of settings to try, as in `ARMS`, what it returns.
"""


@dataclass(frozen=True)
class Trial:
    """One setting of an arm.

    Attributes:
        label: what distinguishes it within the arm, for people; empty where there is no other.
        method: the method with its settings.
        rate: its learning rate, where the arm's trials differ in that; else None.
        beta: its constant beta, where the arm's trials differ in that; else None.
    """

    label: str
    method: AdaptationMethod
    rate: float | None = None
    beta: float | None = None

    @property
    def adapts_activations(self) -> bool:
        """Whether the `where` of a comparison, which names activation sites, is for this method."""
        return self.method.name in _OF_ACTIVATIONS

    @property
    def settings(self) -> dict[str, Any]:
        """The method's name and settings, as JSON values."""
        return {"method": self.method.name, **_settings(self.method)}

    @property
    def digest(self) -> str:
        """The same for the same settings, and short enough for a file name."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Arm:
    """A method with the settings that are tried, the preferred one of equals first."""

    name: str
    trials: tuple[Trial, ...]


def _steered(count: int) -> tuple[AdaptationMethod, ...]:
    return tuple(SteeredProbe(beta) for beta in _STEERED_BETAS[:count])


def _trainable_ct(count: int) -> tuple[AdaptationMethod, ...]:
    """Both starts at one rate before the next rate: where beta starts matters as much."""
    pairs = [(beta, factor) for factor in _CT_FACTORS for beta in _CT_BETAS][:count]
    rate = TrainableCT().learning_rate
    # Of settings that do equally well the published start is preferred.
    return tuple(
        TrainableCT(init_beta=beta, learning_rate=factor * rate)
        for beta, factor in sorted(pairs, key=lambda pair: _CT_BETAS.index(pair[0]))
    )


ARMS: Mapping[str, AdaptationMethod | Sequence[AdaptationMethod] | Settings] = {
    PROBE: LinearProbe(),
    "steered": _steered,
    "lora": LoRA(),
    "trainable_ct": _trainable_ct,
    "full": FullFinetune(),
}
"""The arms that `tune` knows by name. Each that has something to choose gets as many trials."""


def arms_of(asked: Arms, factors: Sequence[float]) -> tuple[Arm, ...]:
    """The arms asked for, the probe first and in any case.

    Every arm that is asked for by name, or given as one method, and that has something to choose,
    gets as many trials as there are factors.

    Args:
        asked: names or methods; see `Arms`.
        factors: on the learning rate of each method that is given alone and has one.

    Raises:
        FlexureError: an unknown name, an arm without a method, one named like a path, or factors
            that are not positive, not distinct, too large, or more than an arm has settings.
    """
    _check_factors(factors)
    given = _given(asked)
    methods = {PROBE: ARMS[PROBE]} | dict(given)
    return tuple(Arm(name, _trials(name, method, factors)) for name, method in methods.items())


def _given(
    asked: Arms,
) -> Mapping[str, AdaptationMethod | Sequence[AdaptationMethod] | Settings]:
    if asked is None:
        return ARMS
    if isinstance(asked, Mapping):
        wrong = [n for n in asked if not isinstance(n, str) or not n.replace("_", "").isalnum()]
        if wrong:
            raise FlexureError(
                f"expected names of arms made of letters, digits and _, got {wrong[0]!r}; rename it"
            )
        return asked
    names = [asked] if isinstance(asked, str) else list(asked)
    unknown = [name for name in names if name not in ARMS]
    if unknown or not names:
        got = repr(unknown[0]) if unknown else "none"
        raise FlexureError(f"expected arms among {', '.join(ARMS)}, got {got}")
    return {name: ARMS[name] for name in names}


def _trials(
    name: str,
    methods: AdaptationMethod | Sequence[AdaptationMethod] | Settings,
    factors: Sequence[float],
) -> tuple[Trial, ...]:
    found: Any = methods
    if callable(methods) and not isinstance(methods, type):
        found = _as_many(name, methods, len(factors))
    several = isinstance(found, Iterable)
    trials = _as_given(name, tuple(found)) if several else _swept(name, found, factors)
    for trial in trials:
        _check_largest(name, trial)
    return trials


def _as_many(name: str, settings: Settings, count: int) -> Sequence[AdaptationMethod]:
    found = settings(count)
    if len(found) < count:
        raise FlexureError(
            f"expected at most {len(found)} rate factors with the arm {name!r}, which has no more "
            f"settings to try and gets as many trials as every other, got {count}; give fewer, or "
            f"leave the arm out"
        )
    return found


def _as_given(name: str, given: tuple[AdaptationMethod, ...]) -> tuple[Trial, ...]:
    """Several methods, each called by what it differs in."""
    if not given:
        raise FlexureError(f"expected at least one method for the arm {name!r}, got none")
    varied = _varied(given)
    trials = []
    for method in given:
        settings = _settings(method)
        told = ", ".join(f"{key} {_shown(settings.get(key))}" for key in varied)
        rate, beta = (
            settings.get(key) if key in varied else None for key in ("learning_rate", "beta")
        )
        trials.append(Trial(told if len(given) > 1 else "", method, rate, beta))
    if len({trial.digest for trial in trials}) < len(trials):
        raise FlexureError(f"expected different methods for the arm {name!r}, got one twice")
    return tuple(trials)


def _swept(name: str, method: AdaptationMethod, factors: Sequence[float]) -> tuple[Trial, ...]:
    """A method at several learning rates; one without that setting as it is."""
    settings = _settings(method)
    if "learning_rate" not in settings:
        return (Trial("", method),)
    own, trials = settings["learning_rate"], []
    changed: Any = method  # a dataclass, or it would have no settings
    for factor in factors:
        rate = own * factor
        try:
            trials.append(Trial(f"rate {rate:.3g}", replace(changed, learning_rate=rate), rate))
        except FlexureError as error:  # it overflows or vanishes
            raise _unusable(name, f"{factor:g} times {own:g}") from error
    return tuple(trials)


def _check_largest(name: str, trial: Trial) -> None:
    rate = trial.settings.get("learning_rate")
    if isinstance(rate, int | float) and rate > _LARGEST_RATE:
        raise _unusable(name, f"{rate:g}")


def _unusable(name: str, got: str) -> FlexureError:
    return FlexureError(
        f"expected learning rates of the arm {name!r} above 0 and at most {_LARGEST_RATE:g}, got "
        f"{got}; give other rate factors, such as {', '.join(map(str, RATE_FACTORS))}"
    )


def _settings(method: AdaptationMethod) -> dict[str, Any]:
    """The fields of a method as JSON values; a function by what it calls itself."""
    if not is_dataclass(method) or isinstance(method, type):
        raise FlexureError(
            f"expected adaptation methods, such as LoRA(rank=1), got {method!r}; make one"
        )
    found = {}
    for field in fields(method):
        value = getattr(method, field.name)
        name = getattr(value, "__qualname__", None)
        found[field.name] = name if callable(value) and name else to_json(value)
    return found


def _varied(methods: Sequence[AdaptationMethod]) -> list[str]:
    """The settings in which the methods differ, their kind among them."""
    rows = [{"method": method.name, **_settings(method)} for method in methods]
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if any(row.get(key) != rows[0].get(key) for row in rows)]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_factors(factors: Sequence[float]) -> None:
    values = list(factors)
    good = all(isinstance(f, int | float) and 0 < f < float("inf") for f in values)
    if not good or not values or len(set(values)) < len(values):
        raise FlexureError(
            f"expected different positive factors on the learning rate, got {values}; "
            f"{', '.join(map(str, RATE_FACTORS))} is the default"
        )
