"""Robust accuracy: the harness that projects, checks and scores what any attack returns.

How inputs are attacked is the attacks' business; an attack cannot make a model look better or worse
than its results, scored on the model itself, say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexure.attacks.bounded import check_within, limits_of
from flexure.attacks.catalogue import ATTACKS
from flexure.attacks.checks import check_attack, check_seed, checked
from flexure.attacks.draws import SampleGenerators
from flexure.attacks.intact import intact
from flexure.attacks.norms import check_eps, norm_named
from flexure.calling import check_logits, evaluating, logits_of
from flexure.contracts import Attack, FlexureError
from flexure.measuring import measuring
from flexure.per_sample import PerSample

__all__ = ["Robustness", "robust_accuracy"]


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
    finite count as misclassified there. The result bounds the true robust accuracy from above. An
    attack that changes the model is refused, and nothing that it left there is scored.

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
            bounds, an attack that returns something else than finite inputs of the same shape or
            that changes the model, or a model that has no gradient in its input.

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
    eps, seed = check_eps(eps), check_seed(seed)
    norm, attacks = _chosen(attack, norm)
    _check_inputs(x, y, batch_size)
    limits = limits_of(bounded, x.dtype)
    check_within(x, limits)
    x, y = x.detach(), y.detach().to(x.device).long()
    size = len(x) if batch_size is None else batch_size
    with measuring(bounded), _kept_gradients(bounded):
        harness = _Harness(bounded, attacks, norm, eps, limits, seed)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        parts = [
            harness.attacked(x[rows], y[rows], rows)
            for rows in torch.split(torch.arange(len(x)), size)
        ]
    return Robustness.joined(parts)


def _chosen(
    attack: str | Attack | Sequence[str | Attack], norm: str | None
) -> tuple[str, list[Attack]]:
    """The attacks, and their norm."""
    given = [attack] if isinstance(attack, str) or not isinstance(attack, Sequence) else attack
    if not given:
        raise FlexureError(f"expected at least one attack, got {attack!r}; give 'pgd', for example")
    found = [each if isinstance(each, str) else check_attack(each) for each in given]
    norms = {each.norm for each in found if not isinstance(each, str)}
    if norm is not None:
        norm_named(norm)
        norms.add(norm)
    if len(norms) != 1:
        got = ", ".join(sorted(map(repr, norms))) or "none"
        raise FlexureError(
            f"expected one norm, got {got}; give norm='l2' or 'linf', that of the attacks if they "
            f"are objects"
        )
    (name,) = norms
    return name, [
        one for each in found for one in (_named(each, name) if isinstance(each, str) else (each,))
    ]


def _named(name: str, norm: str) -> tuple[Attack, ...]:
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
    labels = isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex()
    if not labels or y.shape != x.shape[:1]:
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise FlexureError(
            f"expected {len(x)} integer labels, a tensor, got {got}; give one a sample"
        )
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise FlexureError(f"expected batch_size of at least 1, got {batch_size!r}; None: all")


@dataclass(frozen=True)
class _Harness:
    """What stays the same from batch to batch."""

    model: nn.Module
    attacks: Sequence[Attack]
    norm: str
    eps: float
    limits: tuple[float, float]
    seed: int

    def attacked(self, x: Tensor, y: Tensor, numbers: Tensor) -> Robustness:
        """The result of one batch; `numbers` are the samples' places in all data."""
        clean = self.clean(x, y)
        robust, x_adv = clean.clone(), x.clone()
        for order in range(len(self.attacks) if self.eps > 0 else 0):
            rows = robust.nonzero().flatten()
            if not len(rows):
                break
            found = self.found(order, x[rows], y[rows], numbers[rows.to(numbers.device)])
            x_adv[rows], (robust[rows], _) = found, _right(self.model, found, y[rows])
        distance = norm_named(self.norm).size(x_adv.double() - x.double())
        ones = torch.ones_like(clean)
        return Robustness(ones, clean, robust, x_adv, distance, self.norm, self.eps)

    def clean(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,) whether predictions at the given inputs are right, once the model takes them."""
        try:
            right, known = _right(self.model, x, y)
        except FlexureError:
            raise
        except Exception as error:
            raise FlexureError(
                f"expected a model that takes inputs {tuple(x.shape)} of {x.dtype}, got an error "
                f"({error}); give inputs of the model's shape and dtype"
            ) from error
        if not bool(known.all()):
            raise FlexureError(
                f"expected finite logits at the given inputs, got others at sample "
                f"{int((~known).nonzero()[0])} of a batch; mend the model or the inputs"
            )
        return right

    def found(self, order: int, x: Tensor, y: Tensor, numbers: Tensor) -> Tensor:
        """What one attack finds, checked; the model is as before."""
        attack = self.attacks[order]
        name = type(attack).__name__
        generator = SampleGenerators((self.seed, order), numbers)
        with intact(self.model, name):
            made = attack.run(self.model, x.clone(), y.clone(), eps=self.eps, generator=generator)
        return checked(made, name, x, norm=self.norm, eps=self.eps, limits=self.limits)


def _right(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) whether predictions are labels, and whether logits are finite."""
    with evaluating(model), torch.no_grad():
        logits = check_logits(logits_of(model(x.clone())), y)
    known = logits.isfinite().all(1)
    return known & (logits.argmax(1) == y), known


@contextmanager
def _kept_gradients(model: nn.Module) -> Iterator[None]:
    """Puts back every `.grad`, which attacks of other libraries may clear."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
