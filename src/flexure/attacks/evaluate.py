"""Robust accuracy: the harness that projects, checks and scores what any attack returns.

How inputs are attacked is the attacks' business; an attack cannot make a model look better or worse
than its results, scored on the model itself, say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, count
from typing import TypeAlias

from torch import Tensor, nn

from flexure.attacks.bounded import check_within, limits_of
from flexure.attacks.catalogue import ATTACKS
from flexure.attacks.checks import check_attack, check_seed
from flexure.attacks.harness import Harness
from flexure.attacks.kept import KeptBatches, check_described, histories, identity
from flexure.attacks.norms import check_eps, norm_named
from flexure.attacks.published import as_published, in_normalised_space
from flexure.attacks.robustness import AttackResult, Robustness
from flexure.attacks.rounds import Rounds
from flexure.contracts import Attack, FlexureError
from flexure.measuring import measuring
from flexure.processes import current_processes
from flexure.progress import Progress, ProgressReporter

__all__ = ["AttackResult", "Attacks", "Robustness", "robust_accuracy"]

Attacks: TypeAlias = "str | Attack | Sequence[str | Attack]"
"""A name in `catalogue.ATTACKS`, an attack with its own settings, or several of both."""


def robust_accuracy(
    bounded: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    attack: Attacks = "apgd-ce",
    norm: str | None = None,
    eps: float,
    seed: int,
    batch_size: int | None = None,
    every: bool = False,
    protocol: str = "standard",
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> Robustness:
    """The accuracy of a classifier on the worst inputs that attacks find within eps of given ones.

    Samples that the model gets wrong as they are count as not robust and are not attacked; of
    several attacks each gets only the samples that withstood those before, in full batches: cheap
    attacks first save time. Whatever an attack returns is projected on the ball and the bounds,
    checked, and scored again on the model in eval mode: a sample is robust if no version that was
    found is misclassified, the worst case over the attacks. Logits that are not finite count as
    misclassified there. The result bounds the true robust accuracy from above. An attack that
    changes the model is refused, and nothing that it left there is scored.

    The model is left as it was, as are the global random generators. These start anew for each
    batch, at a seed made of `seed`, the attack's place and the batch's; an attack draws for each
    sample apart (`draws.SampleGenerators`), so that for models that treat samples alone the size of
    the batches is no matter, up to rounding. Attacks of the AutoAttack library start each batch at
    `seed` itself and draw for the batch as a whole, as that library does.

    Several processes (`accelerate launch`, `torchrun`) each attack whole batches, in turn, and all
    get the same result, that of one process. All must be given the same arguments.

    Args:
        bounded: gives logits, a tensor or `.logits`; its attribute `bounds` is what adversarial
            inputs stay within: a `flexure.Bounded`. None: there are none, which only "pgd" takes;
            a model without the attribute is refused.
        x: (B, *shape), floating point, within the bounds.
        y: (B,) integer labels.
        attack: a name in `attacks.catalogue.ATTACKS`, an `Attack` with its own settings, or
            several, run in this order. All names but "pgd" need the extra `robust` and a model of
            finite bounds. One attack that follows gradients tells little where gradients are
            masked: "autoattack" tells more, and `flexure.masking_report` whether to believe it.
        norm: "l2" or "linf"; None: that of the attacks given as objects.
        eps: the radius in units of x; 0 gives the clean accuracy.
        seed: decides everything random.
        batch_size: samples at a time; None: all.
        every: run each attack on all samples that are right without one, which tells the accuracy
            under each attack alone; the worst case is reported all the same.
        protocol: "standard": all that is said here. "published": the evaluation that Curvature
            Tuning was published with, on a `Bounded` that normalises: normalised inputs are
            attacked and clamped to [0, 1], and what attacks return is neither projected nor
            checked. That is no l_p robustness, and at eps = 0 not the clean accuracy; the result
            is a `PublishedRobustness`, which tells how far the attacks really went.
        resume: a folder for finished batches; those that are there already, of the same model,
            data and settings, are not attacked again. Attacks can be added after the others. Models
            are told apart by their description, their weights, and their logits at x and at one
            random point near each; attacks by the fields of their dataclass
            (`fingerprints.described`). What changes a model's gradients alone, or is read by an
            attack's function from its module, is not seen: give another folder then.
        progress: True: a bar on stderr, of the first process. A callable: (stage, done, total),
            batches of the attack whose name is the stage.

    Raises:
        FlexureError: a model without `bounds`; inputs, labels, outputs or settings that do not
            fit, inputs outside the bounds, an attack that returns something else than finite
            inputs of the same shape or that changes the model, a model that has no gradient in its
            input, a folder of another evaluation, or an error in another process.
        MissingExtraError: the attack is another library's, and it is not installed.

    Example:
        >>> import torch
        >>> from flexure import Bounded
        >>> _ = torch.manual_seed(0)
        >>> model = Bounded(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
        >>> x, attack = torch.rand(6, 1, 2, 2), "pgd"
        >>> y = model(x).argmax(1)
        >>> found = robust_accuracy(model, x, y, attack=attack, norm="linf", eps=1.0, seed=0)
        >>> found.clean_accuracy, found.accuracy, found.attacks[0].found
        (1.0, 0.0, 6)
    """
    processes = current_processes()
    with (
        processes.together(),
        closing(ProgressReporter(progress if processes.is_first else None)) as report,
    ):
        norm, names, attacks = _chosen(attack, norm)
        _check_bounded(bounded)
        _check_inputs(x, y, batch_size, every)
        limits = limits_of(bounded, x.dtype)
        harness = Harness(bounded, norm, check_eps(eps), limits, check_seed(seed))
        check_within(x, limits)
        given, y = x.detach(), y.detach().to(x.device).long()
        published = _is_published(protocol)
        harness, x = in_normalised_space(harness, given) if published else (harness, given)
        size = len(x) if batch_size is None else batch_size
        alone = resume is None and processes.count == 1
        parts = {} if alone else identity(harness, x, y, size)
        if resume is not None:
            check_described(attacks)
        kept = None if resume is None else KeptBatches(resume, parts, harness)
        rounds = Rounds(harness, x, y, size, processes, report, kept)
        if processes.count > 1:
            rounds.check_same((parts, names, *histories(attacks, every=every)))
        with measuring(bounded), _kept_gradients(bounded):
            found = rounds.run(names, attacks, every=every)
        return as_published(found, bounded, given) if published else found


def _chosen(attack: Attacks, norm: str | None) -> tuple[str, tuple[str, ...], tuple[Attack, ...]]:
    """The norm of the attacks, their names, each another, and the attacks."""
    given = [attack] if isinstance(attack, str) or not isinstance(attack, Sequence) else attack
    if not given:
        raise FlexureError(f"expected at least one attack, got {attack!r}; give 'pgd', for example")
    checked = [each if isinstance(each, str) else check_attack(each) for each in given]
    norms = {each.norm for each in checked if not isinstance(each, str)}
    if norm is not None:
        norm_named(norm)
        norms.add(norm)
    if len(norms) != 1:
        got = ", ".join(sorted(map(repr, norms))) or "none"
        raise FlexureError(
            f"expected one norm, got {got}; give norm='l2' or 'linf', that of the attacks if they "
            f"are objects"
        )
    (chosen,) = norms
    named: dict[str, Attack] = {}
    for each in checked:
        row = _row(each, chosen) if isinstance(each, str) else (each,)
        for one in row:
            called = each if isinstance(each, str) and len(row) == 1 else _name(one)
            numbered = (f"{called} #{number}" for number in count(2))
            named[next(name for name in chain([called], numbered) if name not in named)] = one
    return chosen, tuple(named), tuple(named.values())


def _is_published(protocol: str) -> bool:
    if protocol not in ("standard", "published"):
        raise FlexureError(
            f"expected protocol to be 'standard' or 'published', got {protocol!r}; choose one"
        )
    return protocol == "published"


def _row(name: str, norm: str) -> tuple[Attack, ...]:
    if name not in ATTACKS:
        raise FlexureError(
            f"expected attack to be one of {', '.join(map(repr, ATTACKS))}, or an object with norm "
            f"and run, got {name!r}"
        )
    return ATTACKS[name](norm)


def _name(attack: Attack) -> str:
    """What an attack calls itself, or its class."""
    name = getattr(attack, "name", None)
    return name if isinstance(name, str) else type(attack).__name__


def _check_bounded(model: nn.Module) -> None:
    """Refuses a bare model: of normalised inputs a radius would mean something else, unseen."""
    if not hasattr(model, "bounds"):
        raise FlexureError(
            f"expected a model that says within which bounds its inputs are, got a "
            f"{type(model).__name__} without the attribute bounds; give "
            f"flexure.Bounded(model, mean=..., std=...), which takes pixels in [0, 1], or "
            f"Bounded(model, bounds=None) of inputs that have none"
        )


def _check_inputs(x: Tensor, y: Tensor, batch_size: int | None, every: bool) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not x.numel():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FlexureError(
            f"expected inputs (B, *shape), a floating-point tensor, got {got}; scale images to the "
            f"model's bounds"
        )
    labels = isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex()
    if not labels or y.shape != x.shape[:1]:
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise FlexureError(
            f"expected {len(x)} integer labels, a tensor, got {got}; give one a sample"
        )
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise FlexureError(f"expected batch_size of at least 1, got {batch_size!r}; None: all")
    if type(every) is not bool:
        raise FlexureError(f"expected every to be True or False, got {every!r}; name the attacks")


@contextmanager
def _kept_gradients(model: nn.Module) -> Iterator[None]:
    """Puts back every `.grad`, which attacks of other libraries may clear."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
