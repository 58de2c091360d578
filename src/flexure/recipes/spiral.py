"""[CT] Figure 1: a trained ReLU network, steered, without training, at beta 1, 0.9 and 0.5.

Top: the decision boundary of a 3-layer MLP of width 20 on a two-arm spiral. Bottom: the curve of a
9-layer MLP of width 64 fitted to a sine. The paper states depth, width and the number of steps; the
data, the optimiser and its rate are not stated, and are this file's (see `Config`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flexure.calling import logits_of, seeded
from flexure.methods.steer import steer
from flexure.models.mlp import MLP
from flexure.record import record, write_json
from flexure.report import Curve, Picture, Section, boundary, curves, percent, run_table, write_page
from flexure.train.fit import fit

__all__ = ["Config", "Findings", "measure", "run", "sections"]

T = TypeVar("T")

SHOWS = (
    "Steering changes the boundary of a trained network gradually and everywhere, with its weights "
    "untouched, and beta = 1 is the network as it was trained.",
)
DOES_NOT_SHOW = (
    "That a lower beta is better on the spiral or the sine: these networks fit their data at "
    "beta = 1, and far below it they fit it worse.",
    "That curvature falls with every step of beta: only c = 1 with beta near 0 tends to a straight "
    "line.",
    "What the same beta does to another network: it smooths over a width of 1 - beta in a unit's "
    "input, so its effect depends on how large those inputs are.",
)


@dataclass(frozen=True)
class Config:
    """Settings of both parts.

    Attributes:
        seed: of data, initial weights and training.
        betas: what is drawn; the paper's are 1, 0.9 and 0.5.
        cs: second dial, one row of pictures each; the paper's default is 0.5.
        turns: revolutions of a spiral arm.
        noise: standard deviation added to the data of both parts.
        train: training points of either part.
        test: fresh points of the spiral, for the accuracy.
        spiral_steps: full-batch steps of Adam (0.001) of the classifier; the paper's number.
        sine_steps: the same for the regression; the paper's number is 20,000. 0: leave it out.
        grid: points along each side of a boundary picture.
    """

    seed: int = 42
    betas: tuple[float, ...] = (1.0, 0.9, 0.5)
    cs: tuple[float, ...] = (0.5, 1.0)
    turns: float = 1.0
    noise: float = 0.02
    train: int = 400
    test: int = 2000
    spiral_steps: int = 2000
    sine_steps: int = 20_000
    grid: int = 120

    @classmethod
    def small(cls, *, seed: int = 42) -> Config:
        """The classifier as in the paper; the regression with a tenth of its steps."""
        return cls(seed=seed, sine_steps=2000)


@dataclass(frozen=True)
class Setting:
    """How a network was steered."""

    beta: float
    c: float

    def __str__(self) -> str:
        return f"beta {self.beta:g}, c {self.c:g}"


@dataclass(frozen=True)
class Boundary:
    """The steered classifier at one setting.

    Attributes:
        setting: of the dials.
        accuracy: on fresh points, in [0, 1].
        n: how many points.
        margin: `(grid, grid)`, logit of arm 1 minus that of arm 0, lowest x2 first.
    """

    setting: Setting
    accuracy: float
    n: int
    margin: Tensor

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy over points; the network stays the same one."""
        return wilson(self.accuracy, self.n)


@dataclass(frozen=True)
class Fitted:
    """The steered regression at one setting; `y` is `(P,)` at `Findings.line`."""

    setting: Setting
    error: float
    y: Tensor


@dataclass(frozen=True)
class Findings:
    """What was measured, with what the pictures need.

    Attributes:
        points: `(train, 2)` training points of the spiral.
        labels: `(train,)` their arms, 0 or 1.
        extent: half side of the square that is drawn.
        boundaries: one for each setting.
        samples: `(train, 2)` training points of the sine: x and y.
        line: `(P,)` where the fitted curves are evaluated.
        fitted: one for each setting; empty where the regression was left out.
    """

    points: Tensor
    labels: Tensor
    extent: float
    boundaries: tuple[Boundary, ...]
    samples: Tensor
    line: Tensor
    fitted: tuple[Fitted, ...]


def run(
    config: Config, out: str | os.PathLike[str], *, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measures, writes `spiral.json` and `spiral.html` into `out`, and returns the results.

    `progress` is told of every stage, one line each.
    """
    findings = measure(config, progress=progress)
    results = record(config=config, seed=config.seed, numbers=numbers(findings))
    write_json(Path(out) / "spiral.json", results)
    write_page(
        Path(out) / "spiral.html",
        title="Steering a spiral and a sine",
        summary=summary(findings),
        sections=sections(findings),
        shows=SHOWS,
        does_not_show=DOES_NOT_SHOW,
        run=run_table(results),
    )
    return results


def measure(config: Config, *, progress: Callable[[str], None] | None = None) -> Findings:
    """Trains both networks and evaluates them at every beta and c.

    `progress` is told of every stage, one line each.
    """
    tell = progress if progress is not None else _nobody
    generator = torch.Generator().manual_seed(config.seed)
    points, labels = spiral(config.train, config, generator)
    extent = 1.15
    tell(f"spiral: {config.spiral_steps} steps")
    boundaries = _boundaries(config, points, labels, extent, generator)
    line = torch.linspace(-1.0, 1.0, 401)
    x = 2 * torch.rand(config.train, generator=generator) - 1
    y = _sine(x) + config.noise * torch.randn(config.train, generator=generator)
    if config.sine_steps:
        tell(f"sine: {config.sine_steps} steps")
    fitted = _fitted(config, x, y, line) if config.sine_steps else ()
    return Findings(points, labels, extent, boundaries, torch.stack([x, y], 1), line, fitted)


def numbers(findings: Findings) -> dict[str, Any]:
    """The measured numbers, without the pictures' arrays."""
    return {
        "spiral": [
            asdict(b.setting)
            | {"test_accuracy": b.accuracy, "interval": b.interval, "test_points": b.n}
            for b in findings.boundaries
        ],
        "sine": [asdict(f.setting) | {"rmse": f.error} for f in findings.fitted],
    }


def summary(findings: Findings) -> tuple[str, ...]:
    """What was found, one sentence for each part, at the first c."""
    c, n = findings.boundaries[0].setting.c, findings.boundaries[0].n
    accuracies = ", ".join(
        f"{percent(b.accuracy)} ({100 * b.interval[0]:.1f} to {100 * b.interval[1]:.1f}) at beta "
        f"{b.setting.beta:g}"
        for b in findings.boundaries
        if b.setting.c == c
    )
    found = [
        f"Spiral, c = {c:g}: accuracy {accuracies} (one network; 95 % Wilson intervals over "
        f"{n} fresh points)."
    ]
    if findings.fitted:
        errors = ", ".join(
            f"{f.error:.3f} at beta {f.setting.beta:g}" for f in findings.fitted if f.setting.c == c
        )
        found.append(
            f"Sine, c = {c:g}: root mean square error {errors} (no interval: one network)."
        )
    return tuple(found)


def sections(findings: Findings) -> list[Section]:
    """The parts of a report: boundaries, and curves where the regression was run."""
    parts = [
        Section(
            "Decision boundary of a spiral",
            (
                "A 3-layer ReLU network of width 20 was trained on two spiral arms. Its weights "
                "stay as they are; only the dials change.",
            ),
            tuple(_boundary_picture(findings, b) for b in findings.boundaries),
            caption="Black or white line: where the network changes its answer. Circles and "
            "triangles: training points of the two arms. Accuracy is on fresh points.",
        )
    ]
    if findings.fitted:
        parts.append(
            Section(
                "Regression of a sine",
                ("A 9-layer ReLU network of width 64 was fitted to noisy samples of a sine.",),
                tuple(_curve_picture(findings, f) for f in findings.fitted),
                caption="Error: the root mean square distance to the noise-free sine.",
            )
        )
    return parts


def spiral(count: int, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`(count, 2)` points on two arms, the second half a turn behind, and their arms."""
    radius = torch.sqrt(0.02 + 0.98 * torch.rand(count, generator=generator))
    arm = torch.arange(count) % 2
    angle = 2 * math.pi * config.turns * radius + math.pi * arm
    clean = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return clean + config.noise * torch.randn(count, 2, generator=generator), arm


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n independent samples (Wilson 1927); has a width at 0 and 1."""
    z = NormalDist().inv_cdf(0.975)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def _nobody(stage: str) -> None:
    """Who is told of the progress when nobody asked."""


def _boundaries(
    config: Config, points: Tensor, labels: Tensor, extent: float, generator: torch.Generator
) -> tuple[Boundary, ...]:
    test_points, test_labels = spiral(config.test, config, generator)
    model = _network((2, 20, 20, 2), config.seed)
    fit(model, [(points, labels)], epochs=config.spiral_steps, seed=config.seed)
    side = torch.linspace(-extent, extent, config.grid)
    grid = torch.cartesian_prod(side, side).flip(1)  # second coordinate outermost

    def look() -> tuple[float, Tensor]:
        logits = logits_of(model(grid))
        right = logits_of(model(test_points)).argmax(1) == test_labels
        margin = (logits[:, 1] - logits[:, 0]).view(config.grid, config.grid)
        return right.double().mean().item(), margin

    found = _at_each_setting(config, model.eval(), points, look)
    return tuple(
        Boundary(setting, accuracy, config.test, margin) for setting, (accuracy, margin) in found
    )


def _fitted(config: Config, x: Tensor, y: Tensor, line: Tensor) -> tuple[Fitted, ...]:
    model = _network((1, *[64] * 8, 1), config.seed)
    fit(
        model,
        [(x[:, None], y[:, None])],
        epochs=config.sine_steps,
        seed=config.seed,
        loss=nn.functional.mse_loss,
    )

    def look() -> tuple[float, Tensor]:
        curve = model(line[:, None]).squeeze(1)
        return (curve - _sine(line)).square().mean().sqrt().item(), curve

    found = _at_each_setting(config, model.eval(), x[:, None], look)
    return tuple(Fitted(setting, error, curve) for setting, (error, curve) in found)


def _at_each_setting(
    config: Config, model: nn.Module, inputs: Tensor, look: Callable[[], T]
) -> list[tuple[Setting, T]]:
    """Steers `model` to each setting in turn and looks at it; it ends as it was."""
    found = []
    with steer(model, beta=1.0, example=inputs[:2]) as steering, torch.no_grad():
        for c, beta in product(config.cs, config.betas):
            steering.dial(beta, c)
            found.append((Setting(beta, c), look()))
    return found


def _network(sizes: tuple[int, ...], seed: int) -> nn.Module:
    with seeded(seed):
        return MLP(sizes)


def _sine(x: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * x)


def _boundary_picture(findings: Findings, found: Boundary) -> Picture:
    extent = findings.extent
    return boundary(
        found.margin.numpy(),
        extent=(-extent, extent, -extent, extent),
        points=findings.points.numpy(),
        labels=findings.labels.numpy(),
        title=f"{found.setting}: {percent(found.accuracy)} right",
    )


def _curve_picture(findings: Findings, found: Fitted) -> Picture:
    xs = findings.line.tolist()
    samples = findings.samples[:100]
    return curves(
        [
            Curve("steered network", xs, found.y.tolist()),
            Curve("sin(2 pi x)", xs, _sine(findings.line).tolist()),
        ],
        points=Curve("training data", samples[:, 0].tolist(), samples[:, 1].tolist()),
        title=f"{found.setting}: error {found.error:.3f}",
    )
