"""The methods that train a network of low curvature, and their rivals: a table, and combinations.

A method is one row of the table or several with `+` between them; a row says what it does to the
network, to the objective, to the inputs and to the update. Training itself is `flat_run.py`'s.

[LCNN] is Low-Curvature Networks (Srinivas et al., 2022), [CR] the curvature rate's paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from numbers import Real
from typing import Literal

from torch import nn

from flexure.attacks import Adversarial
from flexure.contracts import Example, FlexureError, Penalty, Perturbation, SiteError, UpdateRule
from flexure.methods.lcnn import to_lcnn
from flexure.methods.lcnn_report import parts_of
from flexure.penalties import CURE, CurvatureRate, GradientNorm, LowCurvature
from flexure.surgery import Site, install, plan, sites
from flexure.train.sam import SAM
from flexure.units.smooth import Softplus

__all__ = ["METHODS", "STANDARD", "FlatMethod", "MethodRow", "flat_methods"]

STANDARD = "standard"
"""The paper's baseline, which other methods are compared with."""

STANDARD_BETA = 1000.0
"""Of the softplus of the baseline, and of every method that says nothing else ([LCNN])."""


@dataclass(frozen=True)
class MethodRow:
    """One method of the table.

    Attributes:
        name: unique.
        says: what it is, in words.
        softplus: beta of the softplus that rectifiers become; None: the row says nothing of them.
        keeps: whether rectifiers stay as they are, as part of the method.
        lcnn: the part of `to_lcnn` that it is.
        activates: whether that part replaces activations.
        of: the rows that it stands for.
        strength: default of its one number; None: it has none.
        means: what that number is.
        low_curvature: the argument of `LowCurvature` that the number is.
        penalty: makes its penalty, whose weight the number is.
        perturb: the number -> a perturbation of the inputs.
        update: the number -> an update rule.
    """

    name: str
    says: str
    softplus: float | None = None
    keeps: bool = False
    lcnn: str | None = None
    activates: bool = False
    of: tuple[str, ...] = ()
    strength: float | None = None
    means: str = ""
    low_curvature: Literal["beta_weight", "gamma_weight"] | None = None
    penalty: Callable[[], Penalty] | None = None
    perturb: Callable[[float], Perturbation] | None = None
    update: Callable[[float], UpdateRule] | None = None

    @property
    def decides_activation(self) -> bool:
        """Whether it says what rectifiers become, or that they stay."""
        return self.softplus is not None or self.keeps or self.activates


@dataclass(frozen=True)
class FlatMethod:
    """A row of the table, or several together.

    Attributes:
        name: of the rows, with `+`, in the table's order.
        rows: the rows, those that stand for others replaced by them.
        strengths: row -> its number.
    """

    name: str
    rows: tuple[MethodRow, ...]
    strengths: Mapping[str, float]

    @property
    def says(self) -> str:
        """What it is, in words."""
        return self.told({})

    def told(self, changed: Mapping[str, int]) -> str:
        """What it is, in words.

        Args:
            changed: what `change` gave, so that no word claims what did not happen.
        """
        told = []
        for row in self.rows:
            number = f" ({row.means} {self.strengths[row.name]:g})" if row.means else ""
            told.append(row.says + number + _places(row, changed))
        if not any(row.decides_activation for row in self.rows):
            became = f"rectifiers become softplus with beta {STANDARD_BETA:g}"
            told.append(became + _places(METHODS[STANDARD], changed))
        return "; ".join(told)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of `to_lcnn` that it has."""
        return tuple(row.lcnn for row in self.rows if row.lcnn is not None)

    def change(self, network: nn.Module, example: Example, *, residual: str) -> dict[str, int]:
        """Changes a network in place, before it is trained.

        Args:
            network: the network.
            example: an input, to find activations with.
            residual: what becomes of residual sums where the network becomes an LCNN.

        Returns:
            Part of the network (`"activation"`, `"linear"`, `"norm"`) -> how many of its sites or
            layers were replaced, for those that the method replaces.

        Raises:
            FlexureError: the method does not fit the network, or finds nothing in it to replace.
        """
        changed: dict[str, int] = {}
        betas = [row.softplus for row in self.rows if row.softplus is not None]
        decided = any(row.decides_activation for row in self.rows)
        if betas or not decided:
            needed = bool(betas) and all(row.name != STANDARD for row in self.rows)
            beta = betas[0] if betas else STANDARD_BETA
            changed["activation"] = _smooth(network, example, beta, needed=needed)
        if self.parts:
            with redirect_stdout(StringIO()):  # its report, for each of many runs
                to_lcnn(network, example=example, parts=self.parts, residual=residual)
            done = [part.kind for part in parts_of(network) if not part.left]
            changed |= {kind: done.count(kind) for kind in self.parts}
            self._check_useful(changed)
        return changed

    def penalties(self) -> dict[Penalty, float]:
        """Penalty -> weight, new objects."""
        found = {row.penalty(): self.strengths[row.name] for row in self.rows if row.penalty}
        weights = {
            row.low_curvature: self.strengths[row.name] for row in self.rows if row.low_curvature
        }
        if not weights:
            return found
        given: dict[str, float] = dict.fromkeys(("beta_weight", "gamma_weight"), 0.0) | weights
        return {LowCurvature(**given): 1.0, **found}

    def perturb(self) -> Perturbation | None:
        """How inputs are changed before each step; None: not at all."""
        made = [row.perturb(self.strengths[row.name]) for row in self.rows if row.perturb]
        return made[0] if made else None

    def update(self) -> UpdateRule | None:
        """How an update is made; None: as usual."""
        made = [row.update(self.strengths[row.name]) for row in self.rows if row.update]
        return made[0] if made else None

    def _check_useful(self, changed: Mapping[str, int]) -> None:
        """Refuses parts that were asked for by name, and found nothing to replace.

        A row that stands for several takes those that the network has, if its penalty has some.
        """
        for name in self.name.split("+"):
            rows = [METHODS[part] for part in METHODS[name].of or (name,)]
            needed = [row for row in rows if row.low_curvature] or rows
            kinds = [row.lcnn for row in needed if row.lcnn is not None]
            if kinds and not any(changed[kind] for kind in kinds):
                remedy = "; take specnorm for its layers alone" if len(rows) > 1 else ""
                raise FlexureError(
                    f"expected a {' or '.join(_REPLACED[kind] for kind in kinds)} in the network "
                    f"to replace, got none{remedy}"
                )


def flat_methods(
    names: str | Sequence[str], strengths: Mapping[str, float] | None = None
) -> tuple[FlatMethod, ...]:
    """Methods by their names.

    Args:
        names: of rows of `METHODS`, or several of them with `+`: `"lcnn+gradreg"`.
        strengths: row -> its number, where not the published one.

    Raises:
        FlexureError: no method, an unknown one, one twice, rows that exclude each other, or a
            number that no method has or that is out of range.
    """
    given = [names] if isinstance(names, str) else list(names)
    if not given:
        raise FlexureError(f"expected at least one method, got none; {_known()}")
    numbers = _strengths(strengths or {})
    found = tuple(_method(name, numbers) for name in given)
    called = [method.name for method in found]
    if len(set(called)) < len(called):
        twice = next(name for name in called if called.count(name) > 1)
        raise FlexureError(f"expected each method once, got {twice} several times; drop one")
    used = {row.name for method in found for row in method.rows}
    if idle := sorted(set(strengths or {}) - used):
        raise FlexureError(
            f"expected weights of the methods that are trained, got one of {', '.join(idle)}; "
            f"leave it out, or add the method"
        )
    return found


def _method(name: str, numbers: Mapping[str, float]) -> FlatMethod:
    asked = [part.strip() for part in str(name).split("+")]
    if unknown := [part for part in asked if part not in METHODS]:
        raise FlexureError(f"expected a method, got {unknown[0]!r}; {_known()}")
    order = list(METHODS)
    asked.sort(key=order.index)
    named = [inner for part in asked for inner in (METHODS[part].of or (part,))]
    if len(set(named)) < len(named):
        twice = next(part for part in named if named.count(part) > 1)
        raise FlexureError(f"expected each part of {name!r} once, got {twice} twice; drop one")
    rows = tuple(METHODS[part] for part in named)
    kinds: dict[str, Callable[[MethodRow], object]] = {
        "decides what rectifiers become": lambda row: row.decides_activation,
        "changes the inputs": lambda row: row.perturb,
        "makes the update": lambda row: row.update,
    }
    for does, has in kinds.items():
        if len(several := [row.name for row in rows if has(row)]) > 1:
            raise FlexureError(
                f"expected {name!r} to have one part that {does}, got {' and '.join(several)}; "
                f"drop one of them"
            )
    return FlatMethod(
        "+".join(asked), rows, {row.name: numbers[row.name] for row in rows if row.name in numbers}
    )


def _strengths(given: Mapping[str, float]) -> dict[str, float]:
    """The number of every row that has one."""
    known = {row.name: row.strength for row in METHODS.values() if row.strength is not None}
    for name, value in given.items():
        if name not in known:
            parts = [part for part in METHODS[name].of if part in known] if name in METHODS else []
            remedy = f"give one of its parts {' or '.join(parts)}" if parts else "leave it out"
            raise FlexureError(
                f"expected a weight of one of {', '.join(known)}, got one of {name!r}; {remedy}"
            )
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise FlexureError(
                f"expected the {METHODS[name].means} of {name} to be positive and finite, got "
                f"{value!r}; leave the method out to do without it"
            )
    return {**known, **{name: float(value) for name, value in given.items()}}


def _known() -> str:
    return f"known are {', '.join(METHODS)}, and several of them with + between"


def _places(row: MethodRow, changed: Mapping[str, int]) -> str:
    """How many sites or layers a row replaced, where that is known."""
    kind = row.lcnn or ("activation" if row.softplus is not None else "")
    if kind not in changed:
        return ""
    return f", {changed[kind]} replaced" if changed[kind] else ", nothing to replace"


def _smooth(network: nn.Module, example: Example, beta: float, *, needed: bool) -> int:
    """Puts a softplus in the place of every rectifier; smooth activations stay as they are.

    Returns:
        How many were replaced.

    Raises:
        SiteError: a rectifier cannot be reached; or `needed`, and there is none.
    """
    report = sites(network, example)
    if blocking := [refusal for refusal in report.refused if refusal.blocking]:
        raise SiteError(
            f"expected to reach every rectifier, got {blocking[0].name or 'the model'}: "
            f"{blocking[0].reason}; change the network, or train it as it is (relu)"
        )
    chosen = tuple(site for site in report.sites if _rectifies(site))
    if not chosen:
        if needed:
            raise SiteError(
                f"expected rectifiers to replace by softplus with beta {beta:g}, got none; train "
                f"the network as it is (relu)"
            )
        return 0
    # Not complete: what a smooth network calls under a measure is no rectifier that was missed.
    install(network, plan(report, chosen, complete=False), lambda site, original: Softplus(beta))
    return len(chosen)


def _rectifies(site: Site) -> bool:
    """Whether it is max(x, 0): not one with a slope below zero, nor with a cap."""
    return site.exact_at_relu and all(value is None for value in site.params.values())


_REPLACED: Mapping[str, str] = {
    "activation": "rectifier", "linear": "linear layer or convolution", "norm": "BatchNorm",
}  # fmt: skip
"""Part of `to_lcnn` -> what it replaces."""


def _adversarial(radius: float) -> Perturbation:
    return Adversarial(eps=radius)


_ROWS = (
    MethodRow(
        STANDARD, f"softplus with beta {STANDARD_BETA:g}, the paper's baseline",
        softplus=STANDARD_BETA,
    ),
    MethodRow("relu", "the network as it is", keeps=True),
    MethodRow(
        "softplus-wd", "softplus with beta 10 and weight decay (Dombrowski et al., 2022)",
        softplus=10.0,
    ),
    MethodRow(
        "lcnn", "low-curvature network: all three parts", of=("csoftplus", "specnorm", "gammabn")
    ),
    MethodRow(
        "csoftplus", "centered softplus with learned beta", lcnn="activation", activates=True,
        strength=1e-2, means="penalty on beta", low_curvature="beta_weight",
    ),
    MethodRow("specnorm", "spectrally normalised layers", lcnn="linear"),
    MethodRow(
        "gammabn", "Lipschitz BatchNorm with learned gamma", lcnn="norm",
        strength=1e-2, means="penalty on log gamma", low_curvature="gamma_weight",
    ),
    MethodRow(
        "gradreg", "penalty on the squared gradient norm", strength=GradientNorm.default_weight,
        means="weight", penalty=GradientNorm,
    ),
    MethodRow(
        "cure", "CURE (Moosavi-Dezfooli et al., 2019)", strength=CURE.default_weight,
        means="weight", penalty=CURE,
    ),
    MethodRow(
        "crr", "penalty on the curvature rate [CR]", strength=CurvatureRate.default_weight,
        means="weight", penalty=CurvatureRate,
    ),
    MethodRow(
        "at", "adversarial training, l2 PGD of 3 steps", strength=Adversarial.eps, means="radius",
        perturb=_adversarial,
    ),
    MethodRow(
        "sam", "sharpness-aware minimisation", strength=SAM.rho, means="rho", update=SAM
    ),
)  # fmt: skip

METHODS: Mapping[str, MethodRow] = {row.name: row for row in _ROWS}
"""Name -> row. Defaults are the published ones where the papers state them: 1e-2 for beta and gamma
([LCNN]'s code), 6.1e-3 for the gradient norm (its default at batch 128, made independent of the
batch), 4 for CURE and 0.03 for the curvature rate (their papers), radius 0.1 and 3 steps for
adversarial training ([LCNN] section 5), rho 0.05 for SAM (its paper)."""
