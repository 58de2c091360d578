"""Attacking a model, or two side by side: accuracy against the radius, attack by attack.

Orchestration only: how inputs are attacked and scored is `attacks`' business, whether gradients are
masked that of `attacks/masking.py`, certified radii that of `measure/certificates.py`, and what
came of it is in `attack_model_result.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexure.attacks.bounded import Bounded
from flexure.attacks.catalogue import ATTACKS
from flexure.attacks.checks import check_attack, check_seed
from flexure.attacks.masking import masking_report
from flexure.attacks.masking_result import MaskingReport
from flexure.attacks.norms import check_eps, norm_named
from flexure.contracts import Attack, Batches, DataError, FlexureError
from flexure.measure.certificates import Certificates, certified_radius
from flexure.methods.attack_model_bench import Bench, Task, check_unused
from flexure.methods.attack_model_result import (
    AttackedModel,
    AttackReport,
    CertifiedShare,
    radius_text,
)
from flexure.methods.attack_model_shares import share
from flexure.methods.features import device_of
from flexure.methods.samples import read_samples
from flexure.processes import current_processes
from flexure.progress import Progress, ProgressReporter

__all__ = ["PROTOCOLS", "RADII", "AttackReport", "attack_model"]

RADII: Mapping[str, tuple[float, ...]] = {
    "linf": tuple(k / 255 for k in (0.5, 1, 2, 4, 8)),
    "l2": (0.1, 0.25, 0.5),
}
"""Norm -> the radii of pixels in [0, 1] that are usual for it, and smaller ones, at which networks
that were not trained against attacks differ at all."""

PROTOCOLS = ("standard", "published")


def attack_model(
    model: nn.Module,
    data: Batches | tuple[Tensor, Tensor],
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    attacks: Sequence[str | Attack] = ("apgd-ce",),
    eps: Mapping[str, Sequence[float]] = RADII,
    seed: int = 42,
    batch_size: int | None = None,
    every: bool = False,
    reference: nn.Module | None = None,
    names: tuple[str, str] = ("model", "reference"),
    masking: bool = False,
    source: nn.Module | None = None,
    certify: bool = False,
    keep: int = 8,
    protocol: str | Sequence[str] = "standard",
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> AttackReport:
    """The accuracy of a classifier under attacks of growing radius, in pixel space.

    Each attack gets the samples that withstood those before it, and each radius those that
    withstood the smaller ones of its norm: what is misclassified within a radius is within every
    larger one. The accuracy therefore never increases with eps, and every number bounds the true
    robust accuracy from above. Samples that are misclassified without an attack count as not
    robust and are not attacked.

    The models are not changed.

    Args:
        model: a classifier of normalised inputs, or a `Bounded`.
        data: labelled batches `(x, y)`, or one pair of tensors; x (B, *shape) within the bounds,
            before normalisation.
        mean: of the normalisation, one number a channel, of models that are no `Bounded`; None:
            inputs go in as they are.
        std: likewise.
        bounds: lowest and highest value of inputs; None: there are none.
        attacks: names (`attacks.catalogue.ATTACKS`) or `Attack` objects, in the order in which
            survivors are handed on: cheap ones first. An object is run in its own norm only.
        eps: norm -> radii, in units of x.
        seed: of everything random; both models get the same draws.
        batch_size: samples at a time; None: all.
        every: run each attack on all samples that are right without one, which tells the accuracy
            under each attack alone (`AttackStage.alone`).
        reference: another classifier of the same inputs and classes, such as the unsteered
            network: attacked in the same way, and compared sample by sample.
        names: what to call the two.
        masking: whether to look for masked gradients (`masking_report`) too, at the radius whose
            robust accuracy is nearest to half of the clean one.
        source: the model that attacks are transferred from for that; None: the reference.
        certify: whether to certify l2 radii too (`certified_radius`), at those of `eps`, or without
            any at the usual ones: the network's Lipschitz constant must be bounded.
        keep: adversarial examples to keep for pictures.
        protocol: "standard", "published" (the evaluation of Curvature Tuning's code, in the space
            of normalised inputs: not an l_p robustness), or both.
        resume: folder of finished parts; the same attack continues from it.
        progress: True for a bar on stderr, or a callable (stage, done, total).

    Returns:
        Printable; `.curves`, `.rows()`, `.examples`, `.masking`, `.certificates`, `.to_dict()`.

    Raises:
        DataError: no samples, or inputs that do not make one tensor.
        FlexureError: settings, inputs or models that do not fit (see `robust_accuracy`,
            `masking_report` and `certified_radius`).

    Example:
        >>> import torch
        >>> from flexure.attacks import PGD
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> x = torch.rand(6, 1, 2, 2)
        >>> y = network(x).argmax(1)
        >>> found = attack_model(network, (x, y), attacks=["pgd"], eps={"linf": (0.001, 1.0)})
        >>> [round(point.value, 2) for point in found.curves[-1].accuracy]
        [1.0, 1.0, 0.0]
    """
    tasks = _tasks(attacks, eps, protocol)
    seed = check_seed(seed)
    if type(keep) is not int or keep < 0:
        raise FlexureError(f"expected keep to be a whole number, at least 0, got {keep!r}; give 8")
    x, y = _read(data, device_of(model))
    given = _named(names, model, reference)
    if all(isinstance(each, Bounded) for each in given.values()):
        check_unused(mean, std)
    models = {
        name: each
        if isinstance(each, Bounded)
        else Bounded(each, mean=mean, std=std, bounds=bounds)
        for name, each in given.items()
    }
    reporter = ProgressReporter(progress if current_processes().is_first else None)
    bench = Bench(
        tasks, x, y, seed=seed, batch_size=batch_size, every=every, keep=keep,
        store=None if resume is None else Path(resume), reporter=reporter,
    )  # fmt: skip
    bounded = next(iter(models.values()))
    # First, because it is quick to refuse a network.
    certificates = certified_radius(bounded, x, y, chunk=batch_size) if certify else None
    try:
        runs = (bench.attacked(place, *each) for place, each in enumerate(models.items()))
        found, kept = zip(*runs, strict=True)
    finally:
        reporter.close()
    judged = None
    if masking:
        against = source if source is not None else models.get(names[1])
        judged = _masking(
            bounded, against, found[0], x, y, seed=seed, batch_size=batch_size, progress=progress
        )
    told: dict[str, Any] = {
        "attacks": [each if isinstance(each, str) else repr(each) for each in attacks],
        "eps": {norm: sorted(set(radii)) for norm, radii in eps.items()},
        "protocol": [protocol] if isinstance(protocol, str) else list(protocol),
        "every": every, "seed": seed, "batch_size": batch_size,
        "mean": bounded.mean, "std": bounded.std, "bounds": bounded.bounds,
    }  # fmt: skip
    return AttackReport(
        found,
        kept[0],
        masking=judged,
        certificates=certificates,
        certified=_certified(certificates, eps.get("l2", RADII["l2"])),
        notes=(*_notes(found, tasks), *_beaten_beyond(judged, found[0])),
        settings=told,
    )


def _tasks(
    attacks: Sequence[str | Attack],
    eps: Mapping[str, Sequence[float]],
    protocol: str | Sequence[str],
) -> list[Task]:
    """What to attack with, norm by norm.

    Raises:
        FlexureError: no attack, norm, radius or protocol, or one that there is not.
    """
    protocols = [protocol] if isinstance(protocol, str) else list(protocol)
    if not protocols or not set(protocols) <= set(PROTOCOLS):
        raise FlexureError(
            f"expected protocol to be {' or '.join(map(repr, PROTOCOLS))}, or both, got "
            f"{protocol!r}; choose among them"
        )
    given = _attacks(attacks)
    if not isinstance(eps, Mapping) or not eps:
        raise FlexureError(
            f"expected eps by norm, got {eps!r}; give {{'linf': (1 / 255, 2 / 255)}}, for example"
        )
    tasks = []
    for norm, radii in eps.items():
        norm_named(norm)
        chosen = tuple(each for each in given if isinstance(each, str) or each.norm == norm)
        if not chosen:
            raise FlexureError(f"expected an attack in {norm}, got none; give one, or drop {norm}")
        tasks.append(Task(norm, _radii(norm, radii), chosen))
    if lone := {each.norm for each in given if not isinstance(each, str)} - set(eps):
        raise FlexureError(
            f"expected radii for every attack, got none in {', '.join(sorted(lone))}; add them to "
            f"eps, or drop the attack"
        )
    return [replace(task, protocol=name) for name in dict.fromkeys(protocols) for task in tasks]


def _attacks(attacks: Sequence[str | Attack]) -> list[str | Attack]:
    if isinstance(attacks, str) or not isinstance(attacks, Sequence) or not attacks:
        raise FlexureError(
            f"expected a list of attacks, got {attacks!r}; give ['apgd-ce', 'square'], for example"
        )
    for each in attacks:
        if not isinstance(each, str):
            check_attack(each)
        elif each not in ATTACKS:
            raise FlexureError(
                f"expected attacks among {', '.join(ATTACKS)}, or objects with norm and run, got "
                f"{each!r}; choose one of these"
            )
    return list(attacks)


def _radii(norm: str, radii: Sequence[float]) -> tuple[float, ...]:
    """Increasing, each once."""
    if isinstance(radii, str) or not isinstance(radii, Sequence) or not radii:
        raise FlexureError(f"expected radii for {norm}, got {radii!r}; give one or several")
    found = sorted({check_eps(radius) for radius in radii})
    if found[0] == 0:
        raise FlexureError(
            f"expected radii above 0 for {norm}, got 0; the clean accuracy is told anyhow"
        )
    return tuple(found)


def _named(
    names: tuple[str, str], model: nn.Module, reference: nn.Module | None
) -> dict[str, nn.Module]:
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise FlexureError(f"expected two different names of models, got {names!r}; rename one")
    return {names[0]: model} | ({} if reference is None else {names[1]: reference})


def _read(data: Batches | tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """All inputs and labels, on a device.

    Raises:
        DataError: there are none, or they do not make one tensor.
    """
    pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(d, Tensor) for d in data)
    given: Any = [data] if pair else data
    samples = read_samples(given, "attacked", cache_bytes=sys.maxsize)
    parts = [x for x, _ in samples.inputs()]
    shapes = {tuple(x.shape[1:]) for x in parts if isinstance(x, Tensor)}
    if len(shapes) != 1 or not all(isinstance(x, Tensor) for x in parts):
        got = ", ".join(map(str, sorted(shapes))) or type(parts[0]).__name__
        raise DataError(
            f"expected inputs that are tensors of one shape, got {got}; attacks change one tensor"
        )
    return torch.cat([x.to(device) for x in parts]), samples.labels.to(device)


def _certified(
    certificates: Certificates | None, radii: Sequence[float]
) -> tuple[CertifiedShare, ...]:
    if certificates is None:
        return ()
    return tuple(
        CertifiedShare(eps, share(certificates.certified(eps).cpu())) for eps in sorted(set(radii))
    )


def _masking(
    bounded: Bounded,
    source: nn.Module | None,
    found: AttackedModel,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    batch_size: int | None,
    progress: Progress,
) -> MaskingReport:
    """At the radius where attacks have something to find, and something to miss."""
    half = found.clean_accuracy.value / 2
    at = min(found.at, key=lambda at: (at.protocol != "standard", abs(at.accuracy.value - half)))
    if source is not None and not isinstance(source, Bounded):
        source = Bounded(source, mean=bounded.mean, std=bounded.std, bounds=bounded.bounds)
    return masking_report(
        bounded, x, y, norm=at.norm, eps=at.eps, seed=seed, source=source, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip


def _beaten_beyond(judged: MaskingReport | None, found: AttackedModel) -> Iterator[str]:
    """The accuracy with what the search for masked gradients beat too, where that is lower.

    It is told beside the other one, which alone is comparable with that of a reference.
    """
    if judged is None:
        return
    beaten = torch.zeros_like(found.clean)
    beaten[judged.samples.to(beaten.device)] = ~judged.robust.to(beaten.device)
    for at in found.at:
        if (at.norm, at.protocol) != (judged.norm, "standard") or at.eps < judged.eps:
            continue
        also = int((at.robust & beaten).sum())
        if also:
            yield (
                f"{found.name}, {radius_text(at.eps, at.norm)} in {at.norm}: the search for masked "
                f"gradients beat {also} more of the samples, so that the accuracy over all attacks "
                f"is at most {share(at.robust & ~beaten)} %, not {at.accuracy} %, which all "
                f"tables, curves and differences tell"
            )


def _notes(found: Sequence[AttackedModel], tasks: Sequence[Task]) -> Iterator[str]:
    """What a reader must know."""
    for model in found:
        yield from (f"{model.name}: {text}" for text in model.warnings)
    if any(not task.carries for task in tasks):
        told = (
            f"{at.reached[0]:.3g} for {radius_text(at.eps, at.norm)} in {at.norm}"
            for at in found[0].at
            if at.reached is not None
        )
        yield (
            f"published: attacked in the space of normalised inputs, as Curvature Tuning's code "
            f"does; not an l_p robustness: its largest changes: {', '.join(told) or 'none'}"
        )
