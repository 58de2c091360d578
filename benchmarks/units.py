"""Time of the curvature-tuning unit against the published expression and `F.relu`.

The published expression is a literal transcription of eq. 8 with its 1e-6, its dials tensors as in
the published code. All contestants run in one process, in turn, so that the machine's state (busy
neighbours, freed memory) is the same for all; the numbers are medians over the rounds, of CPU time
with one thread (other processes do not disturb it) and of wall time with several.

What memory the allocator has kept decides much. Where the published expression's temporaries must
be mapped afresh (`faults`: thousands of pages a call) it takes two to ten times as long. Where a
small shape finds all of them in the heap, torch's own transcendental functions bound the ratio that
the pure path can reach.

    python -m flexure.units.kernels && python benchmarks/units.py --threads 1 2

`--no-kernels` measures the pure path.

Targets: forward + backward at most 0.6 of the published time with shared dials and 0.7 per
channel, and at most 0.6 without gradients.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flexure.units.functional import ctu
from flexure.units.kernels import load

SHAPES = ((32, 64, 56, 56), (128, 64, 32, 32), (64, 197, 3072), (256, 4096))
TARGETS = {"shared": 0.6, "per channel": 0.7, "no grad": 0.6}


def published(x: Tensor, beta: Tensor, c: Tensor) -> Tensor:
    """Eq. 8 as published, 1e-6 included."""
    eta = beta / (1 - beta + 1e-6)
    gamma = 1 / (1 - beta + 1e-6)
    return c * x * torch.sigmoid(eta * x) + (1 - c) * F.softplus(gamma * x) / gamma


def dials(shape: tuple[int, ...], kind: str, trainable: bool) -> tuple[Tensor, Tensor]:
    """beta = 0.8 and c = 0.5, one pair or one per channel (axis 1 of 4-D, last of others)."""
    size = () if kind == "shared" else (shape[1], 1, 1) if len(shape) == 4 else (shape[-1],)
    return tuple(torch.full(size, v, requires_grad=trainable) for v in (0.8, 0.5))


def train_step(f: Callable[..., Tensor], x: Tensor, grad: Tensor, *parameters: Tensor):
    """One forward and backward pass; gradients are dropped first, as an optimiser would."""

    def step() -> None:
        for t in (x, *parameters):
            t.grad = None
        f(x, *parameters).backward(grad)

    return step


def evaluate(f: Callable[..., Tensor], x: Tensor, *parameters: object):
    def step() -> None:
        with torch.no_grad():
            f(x, *parameters)

    return step


def cases(shape: tuple[int, ...]):
    """(name, target, published, ours, relu) for one shape."""
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    relu = train_step(F.relu, x, grad)
    for kind, trainable in (("shared", True), ("shared", False), ("per channel", True)):
        p = dials(shape, kind, trainable)
        name = f"{kind}, {'trainable' if trainable else 'fixed'}"
        ours = (
            train_step(ctu, x, grad, *p)
            if trainable
            else train_step(lambda x: ctu(x, 0.8, 0.5), x, grad)
        )
        theirs = (
            train_step(published, x, grad, *p)
            if trainable
            else train_step(lambda x, p=p: published(x, *p), x, grad)
        )
        yield f"forward+backward, {name}", TARGETS[kind], theirs, ours, relu
    relu = evaluate(F.relu, x)
    for kind in ("shared", "per channel"):
        p = dials(shape, kind, False)
        ours = evaluate(ctu, x, *((0.8, 0.5) if kind == "shared" else p))
        yield f"no grad, {kind}", TARGETS["no grad"], evaluate(published, x, *p), ours, relu


def medians(
    contestants: tuple[Callable[[], None], ...], seconds: float
) -> list[tuple[float, float]]:
    """Median time in seconds and page faults of each, in turn for `seconds`, 5 rounds at least."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for f in contestants:
        f()
    times: list[list[float]] = [[] for _ in contestants]
    faults: list[list[int]] = [[] for _ in contestants]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < 200):
        for f, spent, mapped in zip(contestants, times, faults, strict=True):
            before, start = page_faults(), clock()
            f()
            spent.append(clock() - start)
            mapped.append(page_faults() - before)
    return [tuple(map(statistics.median, both)) for both in zip(times, faults, strict=True)]


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def kernel_in_use() -> str:
    library = load()
    return library._name if library else "not in use (python -m flexure.units.kernels builds it)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=4.0, help="per case")
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--no-kernels", action="store_true", help="pure Python throughout")
    options = parser.parse_args()
    if options.no_kernels:
        os.environ["FLEXURE_KERNELS"] = "0"
    print(f"compiled kernel: {kernel_in_use()}")
    missed = 0
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} thread(s); ns per element, thousands of page faults per call")
        print(f"{'shape':>12}  {'case':<40} {'eq. 8':>6} faults {'ctu':>6} faults  ratio  of relu")
        for shape in options.shapes:
            sizes = tuple(map(int, shape.split("x")))
            per_element = 1e9 / torch.Size(sizes).numel()
            for name, target, *contestants in cases(sizes):
                (a, fa), (b, fb), (r, _) = medians(tuple(contestants), options.seconds)
                missed += b / a > target
                verdict = "" if b / a <= target else f"  above {target}"
                print(
                    f"{shape:>12}  {name:<40} {a * per_element:6.2f} {fa / 1e3:6.1f} "
                    f"{b * per_element:6.2f} {fb / 1e3:6.1f} {b / a:6.2f} {b / r:8.1f}{verdict}",
                    flush=True,
                )
    print(f"\n{missed} of the ratios above their target")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
