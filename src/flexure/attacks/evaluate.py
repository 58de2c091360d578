"""Robust accuracy: the harness that projects, checks and scores what any attack returns.

How inputs are attacked is the attacks' business; an attack cannot make a model look better or worse
than its results, scored on the model itself, say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexure.attacks.bounded import check_within, limits_of
from flexure.attacks.draws import SampleGenerators
from flexure.attacks.norms import check_eps, norm_named, project
from flexure.attacks.pgd import PGD
from flexure.calling import check_logits, evaluating, logits_of
from flexure.contracts import Attack, FlexureError
from flexure.measuring import measuring
from flexure.per_sample import PerSample

__all__ = ["ATTACKS", "Robustness", "robust_accuracy"]

ATTACKS: Mapping[str, Callable[[str], Attack]] = {
    "pgd": lambda norm: PGD(norm=norm, until_misclassified=True),
}
"""Name -> the attack of that name in a norm, with the settings of its paper."""

_TOLERANCE = 1e-4
"""Relative excess over the radius that is forgiven: float32 cannot hold the sum x + change."""


@dataclass(frozen=True)
class Robustness(PerSample):
    """Which of B samples a model gets right, and still gets right under attack.

    Attributes:
        clean: (B,) bool, whether the prediction at x is the label.
        robust: (B,) bool, whether it also is at every adversarial version that was found.
        x_adv: (B, *shape), the version that is misclassified, or without one the last that was
            tried; x itself of samples that are not attacked: those misclassified without.
        distance: (B,) float64, ‖x_adv − x‖ in the norm, at most eps (1 + 1e-4).
        norm: of the attack.
        eps: the radius.
    """

    clean: Tensor
    robust: Tensor
    x_adv: Tensor
    distance: Tensor
    norm: str
    eps: float

    @property
    def clean_accuracy(self) -> float:
        """The share of samples that are right without an attack."""
        return float(self.clean.double().mean())

    @property
    def accuracy(self) -> float:
        """The share of samples that are right under attack: the robust accuracy."""
        return float(self.robust.double().mean())

    def __str__(self) -> str:
        return (
            f"clean accuracy {self.clean_accuracy:.1%}, robust accuracy {self.accuracy:.1%} "
            f"({self.norm}, eps {self.eps:.4g}, {len(self)} samples)"
        )


def robust_accuracy(
    bounded: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    attack: str | Attack | Sequence[str | Attack] = "pgd",
    norm: str | None = None,
    eps: float,
    seed: int,
    batch_size: int | None = None,
) -> Robustness:
    """The accuracy of a classifier on the worst inputs that attacks find within eps of given ones.

    Samples that the model gets wrong as they are count as not robust and are not attacked; of
    several attacks each gets only the samples that withstood those before. Whatever an attack
    returns is projected on the ball and the bounds, checked, and scored again on the model in eval
    mode: a sample is robust if no version that was found is misclassified. Logits that are not
    finite count as misclassified there. The result bounds the true robust accuracy from above.

    The model is left as it was, as are the global random generators. What it draws from those
    itself starts at `seed`; an attack draws for each sample apart (`draws.SampleGenerators`), so
    that for models that treat samples alone the size of the batches is no matter, up to rounding.

    Args:
        bounded: gives logits, a tensor or `.logits`; its attribute `bounds` is what adversarial
            inputs stay within: a `flexure.Bounded`. A model without it has no bounds.
        x: (B, *shape), floating point, within the bounds.
        y: (B,) integer labels.
        attack: a name in `ATTACKS`, an `Attack` with its own settings, or several.
        norm: "l2" or "linf"; None: that of the attacks given as objects.
        eps: the radius in units of x; 0 gives the clean accuracy.
        seed: decides everything random.
        batch_size: samples at a time; None: all.

    Raises:
        FlexureError: inputs, labels, outputs or settings that do not fit, inputs outside the
            bounds, or an attack that returns something else than finite inputs of the same shape.

    Example:
        >>> import torch
        >>> from flexure import Bounded
        >>> _ = torch.manual_seed(0)
        >>> model = Bounded(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
        >>> x = torch.rand(6, 1, 2, 2)
        >>> found = robust_accuracy(model, x, model(x).argmax(1), norm="linf", eps=1.0, seed=0)
        >>> found.clean_accuracy, found.accuracy
        (1.0, 0.0)
    """
    eps = check_eps(eps)
    attacks = _chosen(attack, norm)
    limits = limits_of(bounded)
    _check_inputs(x, y, batch_size)
    check_within(x, limits)
    x, y = x.detach(), y.detach().to(x.device).long()
    size = len(x) if batch_size is None else batch_size
    with measuring(bounded), _kept_gradients(bounded):
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        parts = [
            _attacked(bounded, x[rows], y[rows], rows, attacks, eps, limits, seed)
            for rows in torch.split(torch.arange(len(x)), size)
        ]
    return Robustness.joined(parts)


def _chosen(attack: str | Attack | Sequence[str | Attack], norm: str | None) -> list[Attack]:
    """The attacks, all of one norm."""
    given = [attack] if isinstance(attack, str) or not isinstance(attack, Sequence) else attack
    norms = {each.norm for each in given if not isinstance(each, str)} | ({norm} - {None})
    if len(norms) != 1:
        got = ", ".join(sorted(map(repr, norms))) or "none"
        raise FlexureError(
            f"expected one norm, got {got}; give norm='l2' or 'linf', that of the attacks if they "
            f"are objects"
        )
    (name,) = norms
    norm_named(str(name))
    return [_named(each, str(name)) if isinstance(each, str) else each for each in given]


def _named(name: str, norm: str) -> Attack:
    if name not in ATTACKS:
        raise FlexureError(
            f"expected attack to be one of {', '.join(map(repr, ATTACKS))}, or an object with norm "
            f"and run, got {name!r}"
        )
    return ATTACKS[name](norm)


def _check_inputs(x: Tensor, y: Tensor, batch_size: int | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not x.numel():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FlexureError(
            f"expected inputs (B, *shape), a floating-point tensor, got {got}; scale images to the "
            f"model's bounds"
        )
    if y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex():
        raise FlexureError(
            f"expected {len(x)} integer labels, got {y.dtype} of shape {tuple(y.shape)}; give one "
            f"a sample"
        )
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise FlexureError(f"expected batch_size of at least 1, got {batch_size!r}; None: all")


def _attacked(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    numbers: Tensor,
    attacks: Sequence[Attack],
    eps: float,
    limits: tuple[float, float],
    seed: int,
) -> Robustness:
    """The result of one batch; `numbers` are the samples' places in all data."""
    clean = _right(model, x, y, "the given inputs")
    robust, x_adv = clean.clone(), x.clone()
    for order, attack in enumerate(attacks if eps > 0 else ()):
        rows = robust.nonzero().flatten()
        if not len(rows):
            break
        generator = SampleGenerators((seed, order), numbers[rows.to(numbers.device)])
        found = attack.run(model, x[rows], y[rows].clone(), eps=eps, generator=generator)
        found = _checked(found, attack, x[rows], eps, limits)
        x_adv[rows], robust[rows] = found, _right(model, found, y[rows], None)
    norm = attacks[0].norm
    distance = norm_named(norm).size(x_adv.double() - x.double())
    return Robustness(torch.ones_like(clean), clean, robust, x_adv, distance, norm, eps)


def _right(model: nn.Module, x: Tensor, y: Tensor, finite: str | None) -> Tensor:
    """(B,) whether predictions are labels; logits must be finite where `finite` says of what."""
    with evaluating(model), torch.no_grad():
        logits = check_logits(logits_of(model(x.clone())), y)
    known = logits.isfinite().all(1)
    if finite is not None and not bool(known.all()):
        raise FlexureError(
            f"expected finite logits at {finite}, got others at sample {int((~known).nonzero()[0])}"
            f" of a batch; mend the model or the inputs"
        )
    return known & (logits.argmax(1) == y)


def _checked(
    found: Tensor, attack: Attack, x: Tensor, eps: float, limits: tuple[float, float]
) -> Tensor:
    """What an attack returned, within the ball and the bounds."""
    name = type(attack).__name__
    if not isinstance(found, Tensor) or found.shape != x.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise FlexureError(f"expected {name} to return inputs {tuple(x.shape)}, got {got}; mend it")
    found = found.detach().to(x)
    if not bool(found.isfinite().all()):
        raise FlexureError(f"expected {name} to return finite inputs, got nan or infinity; mend it")
    found = project(found, x, norm=attack.norm, eps=eps, limits=limits)
    farthest = float(norm_named(attack.norm).size(found.double() - x.double()).max())
    within = bool(((found >= limits[0]) & (found <= limits[1])).all())
    if farthest > eps * (1 + _TOLERANCE) or not within:
        raise FlexureError(
            f"expected projected inputs within {eps} and within {limits}, got a distance of "
            f"{farthest}; use float64 or a larger eps"
        )
    return found


@contextmanager
def _kept_gradients(model: nn.Module) -> Iterator[None]:
    """Puts back every `.grad`, which attacks of other libraries may clear."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
