"""Networks on the digits, honest ones and ones whose gradients are masked on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flexure.attacks import PGD, Bounded

Change = Callable[[Tensor], Tensor]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) in [0, 1], shuffled, and labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(data.target)[order]


def held_out(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[1200 + start :][:count], y[1200 + start :][:count]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def affine() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


@cache
def trained(make: Callable[[], nn.Module], eps: float = 0.0, epochs: int = 6) -> nn.Module:
    """A network trained on digits, at adversarial ones where a radius is given."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        attack = PGD("linf", steps=3, keep="last")
        inputs, labels = (part[:1200] for part in digits())
        for epoch in range(epochs):
            for rows in torch.randperm(1200).split(100):
                x, y = inputs[rows], labels[rows]
                if eps:
                    generator = torch.Generator().manual_seed(epoch)
                    x = attack.run(Bounded(model), x, y, eps=eps, generator=generator)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


class Changed(nn.Module):
    """A network with something before it, and something after."""

    def __init__(
        self, model: nn.Module, before: Change | None = None, after: Change | None = None
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x if self.before is None else self.before(x))
        return logits if self.after is None else self.after(logits)


class NoiseForGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.randn_like(gradient)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("there is none")


def quantised(levels: int) -> Change:
    return lambda x: torch.round(x * levels) / levels


def straight_through(change: Change) -> Change:
    return lambda x: x + (change(x) - x).detach()


def compressed(step: float) -> Change:
    """Blocks of 8 by 8 as JPEG stores them: rounded coefficients of the cosine transform."""
    k = torch.arange(8.0)
    cosines = torch.cos(math.pi * (2 * k + 1) * k[:, None] / 16) / 2
    cosines[0] /= 2**0.5

    def compress(x: Tensor) -> Tensor:
        coefficients = torch.round(cosines @ x @ cosines.T / step) * step
        return cosines.T @ coefficients @ cosines

    return compress


def rolled(x: Tensor) -> Tensor:
    return torch.roll(x, torch.randint(-1, 2, (2,)).tolist(), (2, 3))


def thermometer(x: Tensor) -> Tensor:
    return (x > torch.linspace(0.05, 0.95, 10).view(1, 10, 1, 1)).float().mean(1, keepdim=True)


def noise_of_the_input(x: Tensor) -> Tensor:
    """The same noise for the same input, and another one next to it."""
    seed = int(float(x.detach().double().sum()) * 1e6) % 2**31
    return x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def half_cut(x: Tensor) -> Tensor:
    """No gradient reaches every other column."""
    kept = torch.zeros_like(x)
    kept[..., ::2] = 1
    return x * kept + (x * (1 - kept)).detach()


def rarely_noisy(x: Tensor) -> Tensor:
    return x + 0.5 * torch.randn_like(x) if torch.rand(()) < 0.1 else x


class SixteenBits(nn.Module):
    """A network in bfloat16, or under autocast; it gives what it computes, or that in float32."""

    def __init__(self, model: nn.Module, autocast: bool, given: torch.dtype) -> None:
        super().__init__()
        self.model = deepcopy(model) if autocast else deepcopy(model).bfloat16()
        self.autocast, self.given = autocast, given

    def forward(self, x: Tensor) -> Tensor:
        if not self.autocast:
            return self.model(x.bfloat16()).to(self.given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x).to(self.given)


MASKS: dict[str, dict[str, Change]] = {
    **{f"round, {k}": {"before": quantised(k)} for k in (4, 8, 16, 255)},
    **{
        f"round straight through, {k}": {"before": straight_through(quantised(k))}
        for k in (4, 8, 16, 255)
    },
    "logits x 1e2": {"after": lambda z: 1e2 * z},
    "logits x 1e3": {"after": lambda z: 1e3 * z},
    "logits x 1e4": {"after": lambda z: 1e4 * z},
    "log-probabilities x 1e3": {"after": lambda z: F.log_softmax(1e3 * z, 1)},
    "probabilities, cold": {"after": lambda z: F.softmax(100 * z, 1)},
    "noise": {"before": lambda x: x + 0.1 * torch.randn_like(x)},
    "little noise": {"before": lambda x: x + 0.01 * torch.randn_like(x)},
    "dropout": {"before": lambda x: F.dropout(x, 0.1, True)},
    "roll": {"before": rolled},
    "rare noise": {"before": rarely_noisy},
    "half cut": {"before": half_cut},
    "noise of the input": {"before": noise_of_the_input},
    "JPEG": {"before": compressed(0.2)},
    "JPEG straight through": {"before": straight_through(compressed(0.2))},
    "detached": {"before": lambda x: x.detach()},
    "no derivative": {"before": NoGradient.apply},
    "noise for a gradient": {"before": NoiseForGradient.apply},
    "thermometer": {"before": thermometer},
    "thermometer straight through": {"before": straight_through(thermometer)},
    "ripple": {"before": lambda x: x + 0.02 * torch.sin(3000 * x)},
}
"""Name -> what masks the gradients of any network on the digits."""
