"""How a network uses its weights: with which input sizes, and where without a call of their layer.

Found by one forward pass that leaves no trace. What is then done with a layer is not known here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from flexure.calling import call_model, copied, evaluating
from flexure.contracts import Example, SiteError
from flexure.surgery.preserve import preserved

__all__ = ["BareUse", "WeightUses", "weight_uses"]


@dataclass(frozen=True)
class BareUse:
    """A weight that a function takes while its layer is not running.

    Attributes:
        weight: the parameter's name.
        function: the function's name.
        caller: path of the module that calls it ("" is the model).
    """

    weight: str
    function: str
    caller: str


@dataclass(frozen=True)
class WeightUses:
    """What one forward pass showed.

    Attributes:
        inputs: path of a module -> the shapes of the first input of each of its calls, in order,
            each once; of a module with several paths, under the first.
        used: names of the weights that a function took, whoever called it.
        bare: uses of weights while their layer is not running, in order, each once.
        functions: (caller, name) of the normalisations that were called as functions.
        resized: paths of the transposed convolutions that were called with an `output_size`.
    """

    inputs: dict[str, tuple[tuple[int, ...], ...]]
    used: frozenset[str]
    bare: tuple[BareUse, ...]
    functions: tuple[tuple[str, str], ...]
    resized: frozenset[str] = frozenset()


def weight_uses(model: nn.Module, example: Example) -> WeightUses:
    """Runs `example` once, in eval mode, and looks at every function that takes a weight.

    A weight is a parameter of two or more dimensions, or what is cut from one. Adding it (a
    positional embedding), or putting it beside other values, is no use of it here: it changes no
    slope.

    Args:
        model: any network, in no wrapper.
        example: one input.

    Raises:
        SiteError: the example does not run through the model.
    """
    watch = _Watch(model)
    with preserved(model), evaluating(model), torch.no_grad(), watch.hooks():
        try:
            with watch:
                call_model(model, copied(example))
        except Exception as error:
            raise SiteError(
                f"the example does not run through the model: {type(error).__name__}: {error}; "
                f"give one input that the model takes"
            ) from error
    return WeightUses(
        {path: tuple(shapes) for path, shapes in watch.inputs.items()},
        frozenset(watch.used),
        tuple(watch.bare),
        tuple(watch.functions),
        frozenset(watch.resized),
    )


class _Watch(TorchFunctionMode):
    """Sees every function call of the pass, and knows which module is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.names: dict[int, str] = {}
        self.owners: dict[int, set[nn.Module]] = defaultdict(set)
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() > 1:
                    self.names.setdefault(id(parameter), f"{path}.{name}" if path else name)
                    self.owners[id(parameter)].add(module)
        self.views: list[Tensor] = []
        self.stack: list[nn.Module] = []
        # Dictionaries keep order, and each entry once.
        self.inputs: dict[str, dict[tuple[int, ...], None]] = {}
        self.used: set[str] = set()
        self.bare: dict[BareUse, None] = {}
        self.functions: dict[tuple[str, str], None] = {}
        self.resized: set[str] = set()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks on every module, so that the running one is known."""
        handles = []
        for module in self.paths:
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        # Asking for a weight's shape is no use of it.
        if results:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            alone = all(id(x) in self.owners or isinstance(x, nn.Parameter) for x in given)
            for weight in (x for x in given if id(x) in self.owners):
                if name in _VIEWS or (name in _ADDITIONS and alone):
                    self._view(weight, results)
                elif name not in _ADDITIONS:
                    self._weight(weight, func)
        caller = self.stack[-1] if self.stack else self.model
        if func in _NORMALISATIONS and not type(caller).__module__.startswith("torch.nn.modules"):
            self.functions[self.paths.get(caller, ""), func.__name__] = None
        return out

    def _view(self, weight: Tensor, results: list[Tensor]) -> None:
        """What is cut from a weight, or shaped anew, stands for it."""
        self.views += results  # alive, so that no other tensor gets their ids
        for result in results:
            if id(result) not in self.owners:
                self.names[id(result)] = self.names[id(weight)]
                self.owners[id(result)] = self.owners[id(weight)]

    def _weight(self, weight: Tensor, func: Any) -> None:
        running = self.stack[-1] if self.stack else self.model
        self.used.add(self.names[id(weight)])
        if running not in self.owners[id(weight)]:
            name = getattr(func, "__name__", str(func))
            self.bare[BareUse(self.names[id(weight)], name, self.paths.get(running, ""))] = None

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.stack.append(module)
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        shapes = self.inputs.setdefault(self.paths[module], {})
        if first is not None:
            shapes[tuple(first.shape)] = None
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        if isinstance(module, _ConvTransposeNd) and size is not None:
            self.resized.add(self.paths[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()


_ADDITIONS = {
    *("add", "radd", "iadd", "sub", "rsub", "isub", "where"),
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack"),
}
"""Functions, by their names without underscores, that multiply nothing by a weight."""

_VIEWS = {
    *("get", "getitem", "expand", "expand_as", "view", "view_as", "reshape", "flatten"),
    *("unflatten", "squeeze", "unsqueeze", "t", "transpose", "swapaxes", "permute", "movedim"),
    *("repeat", "tile", "chunk", "split", "unbind", "narrow", "select", "clone", "contiguous"),
    *("to", "type_as", "float", "double", "half", "bfloat16", "detach"),
}
"""Those whose result has a weight's own entries."""

_NORMALISATIONS = {
    nn.functional.batch_norm,
    nn.functional.layer_norm,
    nn.functional.group_norm,
    nn.functional.instance_norm,
    nn.functional.rms_norm,
    nn.functional.local_response_norm,
    nn.functional.normalize,
}
