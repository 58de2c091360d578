"""Linear probes on frozen features, for many feature sets at once.

Two ways of training: to convergence (`fit_probes`), and as published (`fit_published_probes`).
Where the features come from is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexure.contracts import DataError, FlexureError
from flexure.methods.logistic import solve, with_ones

__all__ = ["RIDGES", "Features", "Probe", "fit_probes", "fit_published_probes"]

Features = Tensor | Sequence[Tensor]
"""(K, N, D), or K tensors of (N, D): one feature set for each problem."""

RIDGES: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Default path. On standardised features 1 leaves little but the class means; at 1e-4 the penalty
hardly acts on any direction that the data determine."""

SMALLEST_SCALE = 0.1
"""A feature is divided by its standard deviation, but at least by this share of the features'
root-mean-square standard deviation."""

_TOLERANCE, _SHARE = 1e-5, 0.02  # in directions without data only the ridge holds a coefficient

_CACHE_CHUNK = 8 * 2**20  # bytes: the solver passes over its features again and again
_MEMORY_CHUNK = 2**30
_MAX_ROTATED = 1024  # an eigenbasis costs D³, which beyond this is more than it saves


@dataclass(frozen=True)
class Probe:
    """A trained linear classifier of raw features, and how it did on validation data.

    Attributes:
        weight: (C, D) float32. The standardisation of the features is folded in.
        bias: (C,) float32.
        correct: (N_val,) bool, which validation samples it gets right.
        accuracy: their share.
        nll: mean validation cross-entropy, in nats.
        converged: the gradient met the tolerance; None for the published protocol, which stops
            after a number of epochs.
        ridge: strength of the penalty that was chosen, None for the published protocol.
        epoch: the epoch that was kept (from 1), None for the converged protocol.
    """

    weight: Tensor
    bias: Tensor
    correct: Tensor
    accuracy: float
    nll: float
    converged: bool | None = None
    ridge: float | None = None
    epoch: int | None = None

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) raw features -> (N, C)."""
        return nn.functional.linear(features, self.weight.to(features), self.bias.to(features))

    def linear(self) -> nn.Linear:
        """A new layer that computes `logits`."""
        classes, dimension = self.weight.shape
        layer = nn.Linear(dimension, classes, device="meta")  # no random numbers are drawn
        layer.weight = nn.Parameter(self.weight.clone())
        layer.bias = nn.Parameter(self.bias.clone())
        return layer


def fit_probes(
    features: Features,
    labels: Tensor,
    *,
    val_features: Features,
    val_labels: Tensor,
    ridges: Sequence[float] = RIDGES,
    tolerance: float | None = None,
    max_iterations: int = 100,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    chunk_bytes: int | None = None,
) -> list[Probe]:
    """Multinomial logistic regression with a ridge chosen on validation data, to convergence.

    Minimises mean cross-entropy + ridge/2 · ‖W‖² (bias free) on features standardised by the mean
    and standard deviation of each problem's *training* features; a standard deviation below a
    tenth of their root mean square counts as that tenth. The path goes from the strongest
    ridge to the weakest, each fit starting where the last ended. The ridge with the highest
    validation accuracy is kept; ties go to the lower validation cross-entropy, then to the
    stronger ridge. No randomness is involved.

    Args:
        features: K training sets, (N, D) each.
        labels: (N,) int64 in range(C), every class present.
        val_features: K validation sets, (N_val, D) each.
        val_labels: (N_val,) int64 in range(C).
        ridges: strengths of the penalty, >= 0.
        tolerance: largest absolute entry of the gradient at which a fit is converged; default: a
            fiftieth of the ridge, at most 1e-5, which leaves the coefficients within about 1 %.
        max_iterations: Newton steps per ridge and precision.
        dtype: of the arithmetic; sums of the objective are float64 in any case. Where float32
            does not reach the tolerance, the last steps are taken in float64.
        device: where to compute; default: where the features are.
        chunk_bytes: working memory; as many problems as fit are trained together, at least one.
            Default: 8 MiB on CPUs, where more is slower, 1 GiB elsewhere.

    Returns:
        K probes on the CPU.

    Raises:
        DataError: shapes that do not belong together, labels out of range, non-finite features.
        FlexureError: no ridge, or a negative one.
    """
    path = sorted(ridges, reverse=True)
    if not path or not all(ridge >= 0 for ridge in path):
        raise FlexureError(f"expected at least one ridge, each >= 0, got {tuple(ridges)}")
    classes = _check(features, labels, val_features, val_labels)
    probes: list[Probe] = []
    place = torch.device(device) if device is not None else features[0].device
    budget = chunk_bytes or (_CACHE_CHUNK if place.type == "cpu" else _MEMORY_CHUNK)
    for train, val in _chunks(features, val_features, classes, dtype, place, budget):
        y, y_val = labels.to(train.device), val_labels.to(train.device)
        space = _Standardised(train)
        x, x_val = space.map(train), space.map(val)
        theta = x.new_zeros(len(train), classes, x.shape[2])
        choice = _Choice(theta)
        for ridge in path:
            goal = min(_TOLERANCE, _SHARE * ridge or _TOLERANCE) if tolerance is None else tolerance
            theta, converged = solve(
                x, y, ridge=ridge, start=theta, tolerance=goal, max_iterations=max_iterations
            )
            choice.offer(theta, x_val, y_val, ridge, converged)
        probes += _finish(*space.unmap(choice.theta), val, y_val, choice)
    return probes


def fit_published_probes(
    features: Features,
    labels: Tensor,
    *,
    val_features: Features,
    val_labels: Tensor,
    seed: int,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    device: torch.device | str | None = None,
    chunk_bytes: int | None = None,
) -> list[Probe]:
    """The probe of the Curvature Tuning paper, for all feature sets side by side.

    Adam on the mean cross-entropy of shuffled minibatches of raw features; the rate rises
    linearly over the steps of the first epoch and falls to a tenth after the tenth; the epoch of
    the highest validation accuracy is kept, the first of equals. All problems share the initial
    values (those of `nn.Linear`) and the order of the minibatches, both given by `seed`: each
    problem is trained exactly as if it were trained alone.

    Args:
        features: K training sets, (N, D) each.
        labels: (N,) int64 in range(C), every class present.
        val_features: K validation sets, (N_val, D) each.
        val_labels: (N_val,) int64 in range(C).
        seed: of initial values and shuffling.
        epochs: the paper's 20.
        batch_size: the paper's 32; the last, smaller batch is kept.
        learning_rate: the paper's 1e-3.
        device: where to compute; default: where the features are.
        chunk_bytes: as in `fit_probes`; default 1 GiB.

    Returns:
        K probes on the CPU.

    Raises:
        DataError: shapes that do not belong together, labels out of range, non-finite features.
    """
    classes = _check(features, labels, val_features, val_labels)
    probes: list[Probe] = []
    place = torch.device(device) if device is not None else features[0].device
    budget = chunk_bytes or _MEMORY_CHUNK
    for train, val in _chunks(features, val_features, classes, torch.float32, place, budget):
        y, y_val = labels.to(train.device), val_labels.to(train.device)
        adam = _BatchedAdam(train, y, classes, seed)
        x_val = with_ones(val)
        choice = _Choice(adam.theta)
        for epoch in range(1, epochs + 1):
            adam.epoch(epoch, batch_size, learning_rate)
            choice.offer(adam.theta, x_val, y_val, float(epoch), None, by_nll=False)
        probes += _finish(choice.theta[..., :-1], choice.theta[..., -1], val, y_val, choice)
    return probes


class _Choice:
    """Keeps, for each problem, the parameters that do best on validation data."""

    def __init__(self, theta: Tensor) -> None:
        k, device = len(theta), theta.device
        self.theta = theta.clone()
        self.hits = torch.full((k,), -1, dtype=torch.int64, device=device)
        self.nll = torch.full((k,), torch.inf, dtype=torch.float64, device=device)
        self.setting = torch.zeros(k, dtype=torch.float64, device=device)
        self.converged: Tensor | None = None

    def offer(
        self,
        theta: Tensor,
        x: Tensor,
        labels: Tensor,
        setting: float,
        converged: Tensor | None,
        *,
        by_nll: bool = True,
    ) -> None:
        """Takes `theta` (K, C, D + 1) where it is better on `x` (K, N_val, D + 1)."""
        z = theta @ x.transpose(1, 2)
        hits = (z.argmax(1) == labels).sum(1)
        nll = _cross_entropy(z, labels)
        better = hits > self.hits
        if by_nll:
            better |= (hits == self.hits) & (nll < self.nll)
        self.theta = torch.where(better[:, None, None], theta, self.theta)
        self.hits = torch.where(better, hits, self.hits)
        self.nll = torch.where(better, nll, self.nll)
        self.setting = torch.where(better, setting, self.setting)
        if converged is not None:
            kept = converged if self.converged is None else self.converged
            self.converged = torch.where(better, converged, kept)


class _Standardised:
    """The space that the converged probe is trained in: standardised, and rotated if small.

    The rotation to the eigenbasis of the covariance changes neither the ridge nor the solution,
    only the speed: it makes the solver's diagonal preconditioner a good one.
    """

    def __init__(self, train: Tensor) -> None:
        variance, self.mean = torch.var_mean(train.double(), dim=1, keepdim=True, correction=0)
        # A constant feature carries nothing; its rounding errors must not be blown up.
        own = variance.sqrt()
        constant = own <= 1e-6 * self.mean.abs() + torch.finfo(torch.float32).tiny
        # A unit that is dead at beta = 1 is nearly dead just below it. To blow its tiny outputs up
        # to unit variance would make noise of them, and a dip in accuracy that beta does not cause.
        total = torch.where(constant, 0.0, variance).sum(2, keepdim=True)
        typical = (total / (~constant).sum(2, keepdim=True).clamp_min(1)).sqrt()
        scale = torch.maximum(own, SMALLEST_SCALE * typical)
        self.scale = torch.where(constant, torch.inf, scale)
        self.basis: Tensor | None = None
        if train.shape[2] <= _MAX_ROTATED:
            x = self._standardise(train)
            self.basis = torch.linalg.eigh((x.transpose(1, 2) @ x).double())[1].to(train.dtype)

    def map(self, features: Tensor) -> Tensor:
        """(K, N, D) raw -> (K, N, D + 1), the last column ones."""
        x = self._standardise(features)
        return with_ones(x if self.basis is None else x @ self.basis)

    def unmap(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters for raw features, float64: weight (K, C, D) and bias (K, C)."""
        weight, bias = theta[..., :-1].double(), theta[..., -1].double()
        if self.basis is not None:
            weight = weight @ self.basis.double().transpose(1, 2)
        weight = weight / self.scale
        return weight, bias - (weight * self.mean).sum(2)

    def _standardise(self, features: Tensor) -> Tensor:
        return (features - self.mean.to(features)) / self.scale.to(features)


class _BatchedAdam:
    """Minibatch training of K linear classifiers that see the same samples in the same order.

    Adam (Kingma and Ba, 2015) is written out: `torch.optim` takes seconds to import what it needs
    for its first step.
    """

    def __init__(self, train: Tensor, labels: Tensor, classes: int, seed: int) -> None:
        k, self.n, dimension = train.shape
        # Samples first: a minibatch is then a gather of long rows.
        self.x = with_ones(train).transpose(0, 1).contiguous()
        self.onehot = nn.functional.one_hot(labels, classes).to(train)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also reseed accelerators, which are not restored here.
            torch.default_generator.manual_seed(seed)
            layer = nn.Linear(dimension, classes)
        first = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
        self.theta = first.to(train.device).repeat(k, 1, 1)
        self.mean, self.square = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.steps = 0
        self.generator = torch.Generator().manual_seed(seed)

    def epoch(self, number: int, batch_size: int, learning_rate: float) -> None:
        """One pass over the samples; epochs count from 1."""
        order = torch.randperm(self.n, generator=self.generator).to(self.x.device)
        batches = torch.split(order, batch_size)
        for step, index in enumerate(batches, start=1):
            factor = step / len(batches) if number == 1 else 0.1 if number > 10 else 1.0
            x = self.x[index].transpose(0, 1)  # (K, B, D + 1)
            p = (self.theta @ x.transpose(1, 2)).softmax(1)
            gradient = ((p - self.onehot[index].T) / len(index)) @ x
            self._step(gradient, learning_rate * factor)

    def _step(self, gradient: Tensor, rate: float) -> None:
        first, second, eps = 0.9, 0.999, 1e-8  # the defaults of the paper and of PyTorch
        self.steps += 1
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        unbiased = (self.square.sqrt() / (1 - second**self.steps) ** 0.5).add_(eps)
        self.theta.addcdiv_(self.mean, unbiased, value=-rate / (1 - first**self.steps))


def _finish(
    weight: Tensor, bias: Tensor, val: Tensor, labels: Tensor, choice: _Choice
) -> list[Probe]:
    """Probes whose accuracy is that of the float32 parameters that they hold."""
    weight, bias = weight.float(), bias.float()
    z = torch.baddbmm(bias[..., None], weight, val.float().transpose(1, 2))
    correct, nll = (z.argmax(1) == labels).cpu(), _cross_entropy(z, labels)
    published = choice.converged is None
    probes = []
    for k in range(len(weight)):
        setting = float(choice.setting[k])
        probes.append(
            Probe(
                weight=weight[k].cpu(),
                bias=bias[k].cpu(),
                correct=correct[k],
                accuracy=int(correct[k].sum()) / len(labels),
                nll=float(nll[k]),
                converged=None if choice.converged is None else bool(choice.converged[k]),
                ridge=None if published else setting,
                epoch=int(setting) if published else None,
            )
        )
    return probes


def _cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    """(K, C, N) logits -> (K,) float64."""
    picked = z.gather(1, labels.expand(len(z), 1, -1))[:, 0]
    return (z.logsumexp(1) - picked).mean(1, dtype=torch.float64)


def _chunks(
    features: Features,
    val_features: Features,
    classes: int,
    dtype: torch.dtype,
    device: torch.device,
    budget: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """As many problems at a time as fit the working memory: (k, N, D) and (k, N_val, D)."""
    n, dimension = features[0].shape
    # The features and their standardised copy; logits, probabilities and two temporaries.
    one = (n + len(val_features[0])) * (2 * dimension + 4 * classes) * dtype.itemsize
    size = max(1, budget // one)
    for start in range(0, len(features), size):
        part = slice(start, start + size)
        yield (
            torch.stack(list(features[part])).to(device, dtype),
            torch.stack(list(val_features[part])).to(device, dtype),
        )


def _check(features: Features, labels: Tensor, val_features: Features, val_labels: Tensor) -> int:
    """The number of classes, once everything fits together."""
    if len(features) == 0 or len(features) != len(val_features):
        raise DataError(
            f"expected as many validation as training feature sets, and at least one, got "
            f"{len(val_features)} and {len(features)}"
        )
    dimension = features[0].shape[-1]
    for sets, y, name in ((features, labels, "training"), (val_features, val_labels, "validation")):
        if y.dim() != 1 or y.is_floating_point() or len(y) == 0 or int(y.min()) < 0:
            raise DataError(
                f"expected (N,) integer {name} labels >= 0, got {tuple(y.shape)}, {y.dtype}"
            )
        for k, one in enumerate(sets):
            if tuple(one.shape) != (len(y), dimension):
                raise DataError(
                    f"expected {name} features of shape {(len(y), dimension)}, got "
                    f"{tuple(one.shape)} in set {k}; give one row per label"
                )
            if not bool(one.isfinite().all()):
                raise DataError(f"expected finite {name} features, got nan or inf in set {k}")
    classes = int(labels.max()) + 1
    if int(val_labels.max()) >= classes:
        raise DataError(
            f"expected validation labels below {classes}, the number of training classes, got "
            f"{int(val_labels.max())}; every class must occur in the training data"
        )
    return classes
