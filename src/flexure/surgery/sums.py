"""Residual sums of a network: found by one forward pass, and scaled from then on.

A sum adds two values that both depend on the input; a bias or a positional embedding is none.
Which those are is seen by `sum_watch.py`; frames that change calls are those of `frames.py`. Sums
of the library's own networks are modules: `flexure.layers.residual`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from flexure.calling import call_model, copied, evaluating
from flexure.columns import aligned
from flexure.contracts import Example, SiteError
from flexure.layers.residual import check_factor
from flexure.surgery.census import did_not_run, outermost_scripted
from flexure.surgery.frames import Enter, Frame, Step, forget_compiled, framed
from flexure.surgery.preserve import preserved
from flexure.surgery.sum_watch import SumWatch, is_activation, read_addition
from flexure.surgery.wrapped import unwrapped

__all__ = ["ScaledSums", "Sum", "SumReport", "UnscaledSum", "find_sums", "scale_sums"]


@dataclass(frozen=True)
class Sum:
    """One call of an addition of two values that depend on the input.

    Attributes:
        name: unique: `caller:index`, and `#run` where its caller ran several times.
        caller: path of the module whose `forward` adds ("" is the model).
        index: which of its caller's sums it is, from 0.
        run: which of its caller's runs made it, from 0.
        shape: of the result.
        kind: `a + b`, or `a += b`.
    """

    name: str
    caller: str
    index: int
    run: int
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class UnscaledSum:
    """What combines values that depend on the input, and cannot be scaled as a sum.

    Attributes:
        name: what it is: a function, a sum, a module.
        caller: path of the module that calls it.
        reason: why not.
        calls: how often the example called it there.
    """

    name: str
    caller: str
    reason: str
    calls: int = 1


@dataclass(frozen=True)
class SumReport:
    """Where branches of a network meet.

    Attributes:
        sums: what `scale_sums` scales, in the order of calls.
        refused: what it leaves, each with its reason.
        routes: for each caller of sums, its additions of two tensors in order: the index of the
            sum, or None for another addition.
        scaled: whether `scale_sums` had scaled sums of the model when it was looked at.
    """

    sums: tuple[Sum, ...]
    refused: tuple[UnscaledSum, ...] = ()
    routes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict, repr=False)
    scaled: bool = False

    def rows(self) -> list[dict[str, str]]:
        """The report as a table: one dict a row, by column."""
        rows = [
            {"sum": s.name, "kind": s.kind, "shape": str(s.shape), "what can be done": "scaled"}
            for s in self.sums
        ]
        return rows + [
            {
                "sum": f"{refusal.caller or '(model)'}: {refusal.name}",
                "kind": "-",
                "shape": "-",
                "what can be done": f"left: {refusal.reason}",
            }
            for refusal in self.refused
        ]

    @property
    def summary(self) -> str:
        """One line."""
        count = f"{len(self.sums)} residual sum{'s' * (len(self.sums) != 1)}"
        scaled = "; the model's sums are scaled already" if self.scaled else ""
        return f"{count}; {len(self.refused)} other ways in which branches meet{scaled}"

    def __str__(self) -> str:
        rows = self.rows()
        if not rows:
            return self.summary
        return "\n".join([*aligned(rows), self.summary])


def find_sums(model: nn.Module, example: Example) -> SumReport:
    """Every addition of `model` whose two operands both depend on the input.

    One forward pass of the example in eval mode without gradients, after which parameters,
    buffers, modes and random generators are as before. Additions inside activations (a GELU by
    hand) belong to them; those of hooks are nobody's, and refused. So are reductions over values
    that were stacked or concatenated, as far as they can be followed; a layer after a concatenation
    is none. What TorchScript and compiled extensions add inside, Python cannot see;
    scripted modules are listed as refused.

    Args:
        model: any network; of one that is wrapped, the one inside.
        example: an input with a batch axis: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments.

    Raises:
        SiteError: the example does not run through the model.
    """
    model = unwrapped(model)
    watch = SumWatch(model)
    x = copied(example)
    with preserved(model), evaluating(model), torch.no_grad(), watch.hooks():
        try:
            watch.follow(x)
            with watch:
                call_model(model, x)
        except Exception as error:
            raise SiteError(did_not_run(model, example, error)) from error
    scaled = any(_scales(module) for module in model.modules())
    return replace(_report(watch), scaled=scaled)


@dataclass
class ScaledSums:
    """Sums that are scaled. `remove()` makes them plain again; so does leaving a `with`.

    Attributes:
        factor: what they are multiplied by.
        sums: which they are.
    """

    factor: float
    sums: tuple[Sum, ...]
    _undo: ExitStack

    def remove(self) -> None:
        """Restores the model exactly; a second call does nothing."""
        self._undo.close()

    def __enter__(self) -> ScaledSums:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def scale_sums(model: nn.Module, report: SumReport, factor: float) -> ScaledSums:
    """Makes every sum of a report factor·(a + b), in eval and in train mode.

    A sum in place still overwrites its first operand. Each run of a module that adds must make the
    additions that the example showed, or raises a `SiteError` that names it; what other modules
    add is left alone. Works with `flexure.steer` on the same model, whichever came first.

    Args:
        model: the network of the report, or a copy of it; hooks are put on it, nothing else.
        report: of `find_sums`.
        factor: 1/2 keeps the Lipschitz constant of branches of equal constants, 1/√2 the variance
            of independent ones.

    Raises:
        FlexureError: a factor that is 0 or not finite.
        SiteError: the model has not the modules of the report, or sums that are scaled already.
    """
    check_factor(factor)
    model = unwrapped(model)
    modules = dict(model.named_modules())
    _check(modules, report)
    with ExitStack() as undo:
        for caller, route in report.routes.items():
            steps = tuple(_step(caller, index, factor) for index in route)
            undo.callback(framed(Scaling, modules[caller], caller, steps, strict=True))
        for path in _inside(modules, report):
            undo.callback(framed(Scaling, modules[path], path, (), strict=False))
        forget_compiled()
        undo.callback(forget_compiled)
        return ScaledSums(factor, report.sums, undo.pop_all())


class Scaling(Frame):
    """A frame whose changes are factors, each of a sum."""

    what = "addition"
    remedy = (
        "find_sums again with an example that takes this branch, and scale what it finds; what is "
        "added in train mode alone (noise, running statistics), add in a submodule of its own"
    )
    nested = False

    def read(self, func: Any, args: Any, kwargs: Any) -> tuple[str, Any] | None:
        """An addition, and whether it is in place."""
        found = read_addition(func, args, kwargs)
        return None if found is None else ("a sum of two tensors", found[1])

    def changed(self, change: Any, call: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """The sum times the factor."""
        total = func(*args, **kwargs)
        # What torch has just made is nobody else's yet.
        fresh = type(total) is torch.Tensor and "out" not in kwargs
        return total.mul_(change) if call or fresh else total * change


def _step(caller: str, index: int | None, factor: float) -> Step:
    named = None if index is None else f"{caller}:{index}"
    return "a sum of two tensors", None if index is None else factor, named


def _check(modules: Mapping[str, nn.Module], report: SumReport) -> None:
    missing = sorted(report.routes.keys() - modules.keys())
    if missing:
        raise SiteError(
            f"expected the model of the report, got one without a module "
            f"{', '.join(map(repr, missing))}; find_sums on this model"
        )
    for path, module in modules.items():
        if _scales(module):
            raise SiteError(
                f"the sums of module {path or '(model)'!r} are scaled already; remove() first"
            )


def _scales(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, Enter) and hook.kind is Scaling for hook in hooks)


def _inside(modules: Mapping[str, nn.Module], report: SumReport) -> Iterator[str]:
    """Modules inside callers that may add for themselves, whose sums are none of the callers'.

    While compiling, the stack that tells who calls cannot be walked: frames of their own do. A
    unit that takes an activation's place takes over its hooks.
    """
    for path, module in modules.items():
        around = any(not caller or path.startswith(f"{caller}.") for caller in report.routes)
        plain = type(module).__module__.startswith("torch.nn.modules.")
        # What computes a parameter has no sums of the network's values, and runs at every call.
        around = around and "parametrizations" not in path.split(".")
        if path and around and path not in report.routes and (is_activation(module) or not plain):
            yield path


def _report(watch: SumWatch) -> SumReport:
    sums: list[tuple[int, Sum]] = []
    refused: list[tuple[int, UnscaledSum]] = []
    routes: dict[str, tuple[int | None, ...]] = {}
    for key, runs in watch.runs.items():
        path = watch.paths[key]
        alike = len({tuple(each.scalable for each in run) for run in runs}) == 1
        if alike and any(each.scalable for each in runs[0]):
            numbers = itertools.count()
            routes[path] = tuple(next(numbers) if each.scalable else None for each in runs[0])
        for number, run in enumerate(runs):
            suffix = f"#{number}" if len(runs) > 1 else ""
            index = 0
            for each in filter(lambda addition: addition.signals, run):
                reason = each.reason or (None if alike else _VARIES)
                if reason is not None:
                    refused.append((each.order, UnscaledSum("a + b", path, reason)))
                    continue
                kind = "a += b" if each.inplace else "a + b"
                name = f"{path}:{index}{suffix}"
                sums.append((each.order, Sum(name, path, index, number, each.shape, kind)))
                index += 1
    for other in watch.combinations:
        refused.append((other.order, UnscaledSum(other.function, other.caller, other.reason)))
    for path in outermost_scripted(watch.model):
        refused.append((watch.order, UnscaledSum("TorchScript", path, _SCRIPTED)))
    in_order = [found for _, found in sorted(refused, key=lambda pair: pair[0])]
    counts = Counter(in_order)
    return SumReport(
        tuple(found for _, found in sorted(sums, key=lambda pair: pair[0])),
        tuple(replace(each, calls=count) for each, count in counts.items()),
        routes,
    )


_VARIES = "its caller makes other additions each time; give each its own module"
_SCRIPTED = "whatever it adds, Python cannot see; use the original nn.Module"
