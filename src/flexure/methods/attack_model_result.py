"""What attacking one model or two found. The attacking itself is in `attack_model.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flexure.columns import aligned
from flexure.methods.attack_model_shares import PairedShare, Share, over, paired_share, share
from flexure.record import to_json

__all__ = [
    "CLEAN",
    "WORST",
    "AccuracyCurve",
    "AdversarialExamples",
    "AttackReport",
    "AttackStage",
    "AttackedAt",
    "AttackedModel",
    "CertifiedShare",
    "radius_text",
]

CLEAN = "clean"
"""Of a curve: the accuracy without an attack."""

WORST = "worst case"
"""Of a curve: the accuracy after all attacks."""

_GRAY_LEVELS = 255


@dataclass(frozen=True)
class AttackStage:
    """One attack at one radius.

    Attributes:
        name: of the attack.
        robust: (N,) bool, right after this attack and all before it, smaller radii included.
        tried: (N,) bool, attacked by it.
        beaten: (N,) bool, those of them that it found a misclassified version of.
        seconds: of wall-clock time, summed over processes; of what a resumed run did not do again,
            those of when it was done.
        alone: (N,) bool, right under this attack alone, at all radii up to this one; None: it was
            given no more than the survivors of others.
        warnings: what the attack said.
    """

    name: str
    robust: Tensor
    tried: Tensor
    beaten: Tensor
    seconds: float
    alone: Tensor | None = None
    warnings: tuple[str, ...] = ()

    @property
    def found(self) -> int:
        """Samples that it found an adversarial version of."""
        return int(self.beaten.sum())

    @property
    def seconds_per_attacked(self) -> float:
        """nan where none was attacked."""
        return over(self.seconds, int(self.tried.sum()))

    @property
    def seconds_per_survivor(self) -> float:
        """Seconds for each attacked sample that withstood; nan where none did."""
        return over(self.seconds, int((self.tried & ~self.beaten).sum()))


@dataclass(frozen=True)
class AttackedAt:
    """All attacks on one model at one radius.

    Attributes:
        norm: "linf" or "l2".
        eps: the radius, in units of the inputs; of the published protocol, of normalised ones.
        robust: (N,) bool, right after all attacks: the worst case.
        stages: the attacks in their order; none where no sample was left to attack.
        carried: right samples that were beaten at a smaller radius of the norm already, and so are
            at this one.
        protocol: "standard", or "published": not an l_p robustness.
        reached: of the published protocol, how far its changes really go: the largest of normalised
            inputs, and in units of the inputs; None: all are within `eps`.
    """

    norm: str
    eps: float
    robust: Tensor
    stages: tuple[AttackStage, ...]
    carried: int = 0
    protocol: str = "standard"
    reached: tuple[float, float] | None = None

    @property
    def accuracy(self) -> Share:
        """The robust accuracy: the worst case over the attacks."""
        return share(self.robust)

    def stage(self, name: str) -> AttackStage | None:
        """What an attack did; None where no sample was left for it."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def after(self, name: str) -> Tensor:
        """(N,) bool, right after an attack and all before it."""
        stage = self.stage(name)
        return self.robust if stage is None else stage.robust


@dataclass(frozen=True)
class AttackedModel:
    """One model under all attacks.

    Attributes:
        name: what the model is called.
        clean: (N,) bool, right without an attack.
        at: its results, norm by norm, radii increasing, one protocol after the other.
    """

    name: str
    clean: Tensor
    at: tuple[AttackedAt, ...]

    @property
    def clean_accuracy(self) -> Share:
        """Without an attack."""
        return share(self.clean)

    def found(self, norm: str, eps: float, protocol: str = "standard") -> AttackedAt | None:
        """The result at a radius; None where there is none."""
        wanted = (norm, eps, protocol)
        return next((at for at in self.at if (at.norm, at.eps, at.protocol) == wanted), None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What attacks warned of, each once, with their names."""
        stages = (stage for at in self.at for stage in at.stages)
        return tuple(
            dict.fromkeys(f"{one.name}: {text}" for one in stages for text in one.warnings)
        )


@dataclass(frozen=True)
class AdversarialExamples:
    """A few samples with what beats the model, each at the smallest radius at which it was found.

    Attributes:
        x: (K, *shape), within the bounds.
        x_adv: (K, *shape), misclassified.
        labels: (K,) int64.
        before: (K,) int64, predictions at x: the labels.
        after: (K,) int64, predictions at x_adv; -1 where the logits are not finite.
        positions: (K,) int64, places in the data.
        norms: K norms.
        radii: K radii.
        attacks: K names: which attack found it.
        bounds: lowest and highest value of inputs; None: there are none.
    """

    x: Tensor
    x_adv: Tensor
    labels: Tensor
    before: Tensor
    after: Tensor
    positions: Tensor
    norms: tuple[str, ...]
    radii: tuple[float, ...]
    attacks: tuple[str, ...]
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __len__(self) -> int:
        return len(self.labels)

    def to_dict(self) -> dict[str, Any]:
        """All but the inputs, which are large."""
        names = [name for name in self.__dataclass_fields__ if name not in ("x", "x_adv")]
        return {name: to_json(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class AccuracyCurve:
    """Accuracy against the radius, from eps = 0: the clean accuracy.

    Never increases with eps for the standard protocol.

    Attributes:
        model: its name.
        norm: of the radii.
        attack: accuracy after which attack and those before it; `WORST`: after all of them.
        protocol: see `AttackedAt`.
        eps: radii, the first one 0.
        accuracy: one a radius.
    """

    model: str
    norm: str
    attack: str
    protocol: str
    eps: tuple[float, ...]
    accuracy: tuple[Share, ...]


@dataclass(frozen=True)
class CertifiedShare:
    """The share of samples that no l2 change up to a radius can make wrong.

    Attributes:
        eps: the l2 radius.
        accuracy: the share that is certified.
    """

    eps: float
    accuracy: Share


@dataclass(frozen=True)
class AttackReport:
    """The result of `attack_model`: one model, or two on the same samples.

    Attributes:
        models: the model, and the reference if there is one.
        examples: adversarial examples of the first, kept for pictures.
        masking: whether its gradients are masked (`MaskingReport`); None: not asked for.
        certificates: certified l2 radii of its samples (`Certificates`); None: not asked for.
        certified: share of samples certified at each l2 radius; empty without certificates.
        notes: what a reader must know.
        settings: what was asked for, by name.
    """

    models: tuple[AttackedModel, ...]
    examples: AdversarialExamples
    masking: Any = None
    certificates: Any = None
    certified: tuple[CertifiedShare, ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """That were attacked, those misclassified without included."""
        return len(self.models[0].clean)

    @property
    def clean(self) -> Share:
        """The first model's accuracy without an attack."""
        return self.models[0].clean_accuracy

    @property
    def curves(self) -> tuple[AccuracyCurve, ...]:
        """Accuracy against eps: for each model, norm and protocol after each attack; the worst."""
        return tuple(curve for model in self.models for curve in _curves(model))

    def accuracy(self, norm: str, eps: float, *, model: int = 0) -> Share:
        """The robust accuracy at a radius that was attacked, by the standard protocol.

        Raises:
            KeyError: there is no such radius.
        """
        found = self.models[model].found(norm, eps)
        if found is None:
            raise KeyError((norm, eps))
        return found.accuracy

    def difference(
        self, norm: str | None = None, eps: float = 0.0, protocol: str = "standard"
    ) -> PairedShare | None:
        """The first model's accuracy minus the reference's; None without a reference.

        Args:
            norm: of the worst case at a radius; None: of the clean accuracy.
            eps: the radius.
            protocol: see `AttackedAt`.
        """
        if len(self.models) < 2:
            return None
        if norm is None:
            return paired_share(self.models[0].clean, self.models[1].clean)
        one, other = (model.found(norm, eps, protocol) for model in self.models)
        if one is None or other is None:
            return None
        return paired_share(one.robust, other.robust)

    def rows(self) -> list[dict[str, str]]:
        """The printed table: one row for the clean accuracy, and one an attack and radius."""
        head = {"norm": "", "eps": "0", "attack": CLEAN}
        rows = [self._row(head, [m.clean_accuracy for m in self.models], self.difference())]
        for place, at in enumerate(self.models[0].at):
            both = [model.at[place] for model in self.models]
            names = list(dict.fromkeys(stage.name for each in both for stage in each.stages))
            for name in names or [WORST]:
                head = {
                    "norm": at.norm + (" (published)" if at.protocol != "standard" else ""),
                    "eps": radius_text(at.eps, at.norm),
                    "attack": ("+ " if name != (names or [WORST])[0] else "") + name,
                }
                shares = [share(each.after(name)) for each in both]
                last = not names or name == names[-1]
                told = self.difference(at.norm, at.eps, at.protocol) if last else None
                rows.append(self._row(head, shares, told, at.stage(name)))
        return rows

    def _row(
        self,
        head: dict[str, str],
        shares: Sequence[Share],
        difference: PairedShare | None,
        stage: AttackStage | None = None,
    ) -> dict[str, str]:
        cells = head | {m.name: str(one) for m, one in zip(self.models, shares, strict=True)}
        if len(self.models) > 1:
            cells["difference"] = "" if difference is None else str(difference)
        told: tuple[str, ...] = ("", "", "", "")
        if stage is not None:
            per = (stage.seconds_per_attacked, stage.seconds_per_survivor)
            told = (str(int(stage.tried.sum())), str(stage.found), *map(_seconds, per))
        if self.settings.get("every"):
            alone = None if stage is None else stage.alone
            cells["alone"] = "" if alone is None else str(share(alone))
        names = ("attacked", "found", "s/attacked", "s/survivor")
        return cells | dict(zip(names, told, strict=True))

    def __str__(self) -> str:
        told = f"{self.samples} samples; accuracy in %, 95 % intervals over samples in brackets"
        if len(self.models) > 1:
            told += (
                f"; differences sample by sample, of the worst case; what attacks did is told of "
                f"{self.models[0].name}"
            )
        lines = [told, *aligned(self.rows())]
        if self.certified:
            parts = (f"{radius_text(one.eps, 'l2')}: {one.accuracy}" for one in self.certified)
            lines.append(f"Certified accuracy, l2, in %: {', '.join(parts)}")
        if self.masking is not None:
            lines.append(f"Gradient masking of {self.models[0].name}: {self.masking}")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON terms, every sample's outcome included; not the example inputs."""
        own: dict[str, Any] = {
            name: to_json(getattr(self, name)) for name in self.__dataclass_fields__
        }
        differences = [
            {"norm": at.norm, "eps": at.eps, "protocol": at.protocol}
            | {"difference": to_json(self.difference(at.norm, at.eps, at.protocol))}
            for at in self.models[0].at
        ]
        told = {"clean": to_json(self.difference()), "attacked": differences}
        if own["masking"] is not None:
            own["masking"] = {"model": self.models[0].name} | own["masking"]
        return own | {
            "curves": to_json(self.curves),
            "differences": told if len(self.models) > 1 else None,
        }


def radius_text(eps: float, norm: str) -> str:
    """A radius as people write it: l_inf in grey levels where it is a simple number of them."""
    levels = eps * _GRAY_LEVELS
    short = f"{levels:.3g}"
    simple = norm == "linf" and eps > 0 and math.isclose(levels, float(short), rel_tol=1e-6)
    return f"{short}/{_GRAY_LEVELS}" if simple else f"{eps:.4g}"


def _curves(model: AttackedModel) -> list[AccuracyCurve]:
    found = []
    for norm, protocol in dict.fromkeys((at.norm, at.protocol) for at in model.at):
        rows = [at for at in model.at if (at.norm, at.protocol) == (norm, protocol)]
        eps = (0.0, *(at.eps for at in rows))
        names = dict.fromkeys(stage.name for at in rows for stage in at.stages)
        lines = {name: [at.after(name) for at in rows] for name in names}
        lines[WORST] = [at.robust for at in rows]
        found += [
            AccuracyCurve(
                model.name, norm, name, protocol, eps, (model.clean_accuracy, *map(share, robust))
            )
            for name, robust in lines.items()
        ]
    return found


def _seconds(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.3g}"
