"""One network at one dial after another, attacked cheaply on one split: margins and right answers.

Which dials are tried is `robust_dial`'s and `robust_dial_moves`' business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexure.attacks.bounded import Bounded, limits_of
from flexure.attacks.checks import checked
from flexure.attacks.draws import SampleGenerators
from flexure.attacks.pgd import PGD
from flexure.calling import check_logits, logits_of
from flexure.contracts import Attack, Example, FlexureError
from flexure.fingerprints import fingerprint
from flexure.measuring import measuring
from flexure.methods.robust_dial_groups import ALL_SITES
from flexure.methods.robust_dial_result import RobustDial
from flexure.methods.steer import Steering, steer
from flexure.store import Store
from flexure.surgery.census import check_free
from flexure.surgery.sites import Where

__all__ = ["Axis", "DialBench", "DialledModel", "Installer", "Outcome"]

Axis: TypeAlias = "int | dict[str, int] | None"

_FEW = 2
"""Inputs that tell whether a model takes them."""


@dataclass(frozen=True)
class Outcome:
    """What a network does with N samples at one dial; on the CPU.

    Attributes:
        right: (N,) bool, right without an attack.
        margins: (N,) z_y − max over the other logits, without an attack: above 0 where right.
        attacked: (N,) likewise at the worst input found within the first radius; the margin without
            an attack where that is wrong already.
        robust: radius -> (N,) bool, right with and without the attack.
    """

    right: Tensor
    margins: Tensor
    attacked: Tensor
    robust: Mapping[float, Tensor]

    @property
    def clean(self) -> float:
        """The accuracy without an attack."""
        return float(self.right.double().mean())


class DialledModel:
    """A model that is steered to one dial after another, and left as it was by `close`.

    Args:
        bounded: the model with its bounds.
        groups: name -> the sites in it.
        example: to find the sites with.
        where: the sites to steer.
        axis: of channels, as in `steer`.
        calibration: batches of normalised inputs.
        plain_at_one: whether beta = 1 is the network as it was, at every site.

    Attributes:
        plain_at_one: see above.
    """

    def __init__(
        self,
        bounded: Bounded,
        groups: Mapping[str, tuple[str, ...]],
        *,
        example: Example,
        where: Where,
        axis: Axis,
        calibration: Sequence[Any],
        plain_at_one: bool,
    ) -> None:
        self.bounded, self.groups, self.plain_at_one = bounded, groups, plain_at_one
        self._example, self._where, self._axis = example, where, axis
        self._calibration = calibration
        self._steering: Steering | None = None
        self._match: str | None = None

    def by_site(self, values: Mapping[str, float]) -> float | dict[str, float]:
        """A value for each group as the argument of `steer`."""
        if ALL_SITES in values:
            return values[ALL_SITES]
        return {escape(site): values[name] for name, sites in self.groups.items() for site in sites}

    def turn(self, dial: RobustDial | None) -> nn.Module:
        """The model with its bounds, at a dial; None: as it was."""
        if dial is None or dial.match != self._match:
            self.close()
        if dial is not None:
            beta, c = self.by_site(dial.betas), self.by_site(dial.cs)
            if self._steering is None:
                self._steering, self._match = self.steered(dial), dial.match
            else:
                self._steering.dial(beta, c)
        return self.bounded

    def steered(self, dial: RobustDial | None) -> Steering:
        """Steers the model, which must not be steered.

        Raises:
            FlexureError: there is no dial.
            SiteError: the model is steered already.
        """
        if dial is None:
            raise FlexureError(
                "expected a dial to install, got none: the network does best as it is; use it so"
            )
        kept: dict[str, Any] = {}
        if dial.match is not None:
            kept = {"calibration": self._calibration, "match": dial.match}
        return steer(
            self.bounded.model, beta=self.by_site(dial.betas), c=self.by_site(dial.cs),
            example=self._example, where=self._where, axis=self._axis, **kept,
        )  # fmt: skip

    def installer(self, dial: RobustDial | None, digest: str) -> Installer:
        """What steers the model at a dial later, and needs no more than that.

        Args:
            dial: see `steered`.
            digest: `fingerprint` of the model with its bounds, as it was.
        """
        kept = self._calibration if dial is not None and dial.match is not None else ()
        model = DialledModel(
            self.bounded, self.groups, example=self._example, where=self._where, axis=self._axis,
            calibration=kept, plain_at_one=self.plain_at_one,
        )  # fmt: skip
        return Installer(model, dial, digest)

    def close(self) -> None:
        """Puts the model back; a second call does nothing."""
        if self._steering is not None:
            self._steering.remove()
        self._steering = self._match = None

    def key(self, dial: RobustDial | None) -> Any:
        """What tells dials apart, as JSON values: those that turn every site alike are one."""
        if dial is None:
            return "plain"
        sites = {site: name for name, sites in self.groups.items() for site in sites}
        both = {
            s: [values.get(ALL_SITES, values.get(name)) for values in (dial.betas, dial.cs)]
            for s, name in sorted(sites.items())
        }
        # At beta = 1, c has no effect.
        told = [[s, beta, None if beta == 1 else c] for s, (beta, c) in both.items()]
        return [*told, dial.match]


@dataclass(frozen=True)
class Installer:
    """Steers a model at the dial that a search chose for it."""

    model: DialledModel
    dial: RobustDial | None
    digest: str

    def __call__(self) -> Steering:
        """Steers it.

        Raises:
            FlexureError: there is no dial, or the model is not the one that was searched any more.
            SiteError: the model is steered already.
        """
        if self.dial is not None:
            check_free(self.model.bounded)
            if fingerprint(self.model.bounded) != self.digest:
                raise FlexureError(
                    "expected the network as it was searched, got one whose weights or modules "
                    "changed since; search anew"
                )
        return self.model.steered(self.dial)


class DialBench:
    """Attacks a network at given dials on the samples of one split.

    Args:
        model: at a dial.
        x: (N, *shape) inputs, before normalisation.
        y: (N,) labels.
        attack: a cheap one.
        eps: the radius that margins are told at.
        seed: of the attack.
        batch_size: samples at a time.
        store: of finished dials, or None.
    """

    def __init__(
        self,
        model: DialledModel,
        x: Tensor,
        y: Tensor,
        *,
        attack: Attack,
        eps: float,
        seed: int,
        batch_size: int,
        store: Store | None,
    ) -> None:
        self.model, self.x, self.y = model, x, y
        self._attack, self._eps, self._seed = attack, eps, seed
        self._batch_size, self._store = batch_size, store
        self._known: dict[str, Outcome] = {}

    def __call__(self, dial: RobustDial | None, radii: Sequence[float]) -> Outcome:
        """What the network does at a dial; of the radii, those besides `eps` too.

        A sample that withstands the attack within one radius counts as withstanding it within
        every smaller one, and is not attacked there again; likewise the other way round.
        """
        more = tuple(sorted(set(radii) - {self._eps}))
        return self._kept("attacked", dial, more) or self._found(dial, more)

    def check(self) -> None:
        """Runs the model as it was on a few inputs, and looks at all labels.

        Raises:
            FlexureError: no logits, or labels that are not among them.
        """
        with self._at(None) as model, torch.no_grad():
            logits = logits_of(model(self.x[:_FEW].clone()))
        check_logits(logits, None)
        check_logits(logits[:1].expand(len(self.y), -1), self.y)

    def clean(self, dial: RobustDial | None) -> float:
        """The accuracy without an attack."""
        kept = self._kept("clean", dial, ())
        if kept is not None:
            return kept.clean
        with self._at(dial) as model:
            right, margins = self._scored(model, self.x, self.y)
        return self._keep("clean", dial, (), Outcome(right, margins, margins, {})).clean

    def _found(self, dial: RobustDial | None, more: tuple[float, ...]) -> Outcome:
        with self._at(dial) as model:
            right, margins = self._scored(model, self.x, self.y)
            attacked, robust = margins.clone(), right.clone()
            rows = right.nonzero().flatten()
            robust[rows], attacked[rows] = self._attacked(model, rows, self._eps, self._attack)
            by = {self._eps: robust}
            for eps in reversed([eps for eps in more if eps < self._eps]):
                known = by[min(by)]
                by[eps] = known | self._survivors(model, (right & ~known), eps)
            for eps in [eps for eps in more if eps > self._eps]:
                by[eps] = self._survivors(model, by[max(by)], eps)
        return self._keep("attacked", dial, more, Outcome(right, margins, attacked, by))

    @contextmanager
    def _at(self, dial: RobustDial | None) -> Iterator[nn.Module]:
        model = self.model.turn(dial)
        with measuring(model):
            yield model

    def _survivors(self, model: nn.Module, chosen: Tensor, eps: float) -> Tensor:
        """(N,) bool, which of the chosen samples withstand the attack."""
        robust, rows = torch.zeros_like(chosen), chosen.nonzero().flatten()
        robust[rows], _ = self._attacked(model, rows, eps, _until_wrong(self._attack))
        return robust

    def _attacked(
        self, model: nn.Module, rows: Tensor, eps: float, attack: Attack
    ) -> tuple[Tensor, Tensor]:
        """Whether these samples are right after the attack, and their margins."""
        limits = limits_of(model, self.x.dtype)
        parts = [self._none()]
        for some in torch.split(rows, self._batch_size) if len(rows) else ():
            x, y = self._rows(some)
            draws = SampleGenerators((self._seed,), some)
            made = attack.run(model, x, y, eps=eps, generator=draws)
            name, norm = type(attack).__name__, attack.norm
            parts.append(
                self._scored(model, checked(made, name, x, norm=norm, eps=eps, limits=limits), y)
            )
        right, margins = zip(*parts, strict=True)
        return torch.cat(right), torch.cat(margins)

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        here = rows.to(self.x.device)
        return self.x[here], self.y[here]

    def _scored(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Whether predictions are labels, and the margins."""
        parts = [self._none()]
        with torch.no_grad():
            for some, labels in zip(
                torch.split(x, self._batch_size), torch.split(y, self._batch_size), strict=True
            ):
                logits = check_logits(logits_of(model(some.clone())), labels)
                parts.append(_margins(logits, labels))
        right, margins = zip(*parts, strict=True)
        return torch.cat(right), torch.cat(margins)

    def _none(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.float64)

    def _part(self, kind: str, dial: RobustDial | None, more: tuple[float, ...]) -> str:
        text = json.dumps([kind, self.model.key(dial), list(more)])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def _kept(self, kind: str, dial: RobustDial | None, more: tuple[float, ...]) -> Outcome | None:
        part = self._part(kind, dial, more)
        if part not in self._known and self._store is not None:
            found = self._store.get(part)
            if found is not None:
                radii = [] if kind == "clean" else [self._eps, *more]
                robust = dict(zip(radii, found["robust"], strict=True))
                self._known[part] = Outcome(
                    found["right"], found["margins"], found["attacked"], robust
                )
        return self._known.get(part)

    def _keep(
        self, kind: str, dial: RobustDial | None, more: tuple[float, ...], found: Outcome
    ) -> Outcome:
        part = self._part(kind, dial, more)
        self._known[part] = found
        if self._store is not None:
            none = torch.zeros(0, len(found.right), dtype=torch.bool)
            rows = [found.robust[eps][None] for eps in (self._eps, *more) if found.robust]
            names = ("right", "margins", "attacked")
            # Copies: files cannot hold tensors that share memory.
            tensors = {name: getattr(found, name).clone() for name in names}
            told = {"dial": self.model.key(dial), "clean": found.clean}
            self._store.put(part, tensors | {"robust": torch.cat([none, *rows])}, told)
        return found


def _until_wrong(attack: Attack) -> Attack:
    """The same attack for whoever asks no margins: cheaper, with the same robust samples."""
    if isinstance(attack, PGD) and attack.keep == "best":
        return replace(attack, until_misclassified=True)
    return attack


def _margins(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) whether the prediction is the label, and z_y − max over the others, −inf if unknown."""
    logits, y = logits.detach().cpu().double(), y.cpu()
    known = logits.isfinite().all(1)
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    margins = logits.gather(1, y[:, None]).squeeze(1) - others
    right = known & (logits.argmax(1) == y)
    return right, torch.where(known, margins, -torch.inf)
