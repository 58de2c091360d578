"""Tensors that carry something along through a model's own code: the mechanism, and no rule.

`Carrying` is a tensor subclass; it works on the level of the Python functions of torch, above
autograd, so that what is carried stays differentiable. What is carried, and by which rule an
operation passes it on, is said by its subclasses: Taylor coefficients in `jets.py`, say.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from flexure.contracts import FlexureError
from flexure.measure.running import module_name, name_of, running_module

__all__ = [
    "GENERAL",
    "Carrying",
    "Rule",
    "Unsupported",
    "by_body",
    "carriers_in",
    "primal_of",
    "refused",
    "rule_table",
    "running_module",
    "with_primals",
]

Rule: TypeAlias = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
"""`rule(function, args, kwargs)`: what `function(*args, **kwargs)` is where some of the arguments
are carriers. `function` is always out of place, and takes plain tensors too."""


class Unsupported(Exception):
    """Raised by a rule: what is wrong, and the remedy. The mechanism adds who called what."""


class Carrying(Tensor):
    """A tensor with something carried along; made by `of`, never by its constructor.

    It has the shape, dtype and device of its primal value, and is a tensor to `isinstance`. Every
    operation on it is a rule's of the subclass's table; one without a rule raises. An operation in
    place replaces both values and writes into no memory; it is refused where views share in it.

    Attributes:
        primal: the plain value, with its autograd graph.
        carried: what the subclass carries along.
        rules: made by `rule_table`, on the subclass.
        subject: what the subclass is, in errors.
        unit_rule: `unit_rule(name, x, *dials)`: the rule of the units of `flexure.units`, which
            are not functions of torch. The names are `"ctu"` (beta, c), `"centered_softplus"`
            (beta) and `"soft_maximum"` (beta, c); the result is out of place.
    """

    rules: ClassVar[Mapping[Any, _Spelling]] = {}
    subject: ClassVar[str] = "carrying tensor"
    primal: Tensor
    carried: Any
    _family: list[ref[Carrying]]

    @classmethod
    def of(cls, primal: Tensor, carried: Any) -> Self:
        """A carrier with this plain value."""
        # Never read: `__torch_dispatch__` refuses code that would (vmap, TorchScript).
        nothing = torch.full((), torch.nan, dtype=primal.dtype, device=primal.device)
        shell: Self = nothing.expand(primal.shape).as_subclass(cls)
        shell.primal, shell.carried = primal, carried
        shell._family = [ref(shell)]
        return shell

    def constant(self, primal: Tensor) -> Self:
        """A carrier like this one of a value that does not depend on the input."""
        raise NotImplementedError

    @classmethod
    def unit_rule(cls, name: str, x: Any, *dials: Any) -> Any:
        """See the class."""
        raise NotImplementedError

    @classmethod
    def unit(cls, name: str, x: Any, *dials: Any, inplace: bool = False) -> Any:
        """Called by `flexure.units.functional` for an input that is a carrier."""
        try:
            out = cls.unit_rule(name, x, *dials)
            cls.passed(out, (x, dials))
            return _overwritten(_writable(x), out) if inplace else out
        except Unsupported as error:
            raise cls._error(f"flexure.units.{name}", str(error)) from None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        spelling = cls.rules.get(func)
        try:
            if spelling is None:
                raise Unsupported(f"it has no rule for a {cls.subject}; {cls.advice(func)}")
            out = spelling.run(args, dict(kwargs or {}))
            cls.passed(out, (args, kwargs))
            return out
        except Unsupported as error:
            raise cls._error(name_of(func), str(error)) from None
        except TypeError as error:  # of a rule that has not these arguments
            reason = f"it is called in a way that is not known here ({error})"
            raise cls._error(name_of(func), reason) from error

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Refuses what gets past the functions of torch, to where nothing is carried along."""
        raise cls._error(
            str(func),
            f"it reached a {cls.subject} from below torch's functions (torch.vmap, torch.func, "
            f"TorchScript, a compiled extension, torch.tensor); {cls.advice(func)}",
        )

    @classmethod
    def passed(cls, out: Any, inputs: Any) -> None:
        """Called with each result and what it was made of; raises `Unsupported` to refuse it."""

    @classmethod
    def advice(cls, func: Any) -> str:
        """What a user can do about an operation without a rule."""
        return "write it with operations that have one"

    @classmethod
    def _error(cls, name: str, reason: str) -> FlexureError:
        where = module_name()
        return FlexureError(
            f"expected operations that a {cls.subject} can pass, got {name}"
            f"{f' in {where}' if where else ''}: {reason}"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.primal.shape)}, dtype={self.primal.dtype})"

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: Any) -> Any:
        raise self._error("copy.deepcopy", "a carrier cannot be copied; use .clone()")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._error("pickle", "a carrier cannot be stored; store what it was made of")


def rule_table(rows: Mapping[Any, Rule]) -> dict[Any, _Spelling]:
    """The table of a subclass: each spelling of each operation, with its rule.

    Args:
        rows: names -> rule. Names are separated by blanks; each stands for the functions of that
            name in torch, `torch.Tensor`, `torch.nn.functional` and `torch.special`, its operator,
            reflected and in-place forms, and `inplace=True`. A function as the key stands for
            itself alone, and wins over a name. Later rows win over earlier ones.
    """
    table: dict[Any, _Spelling] = {}
    for names, rule in rows.items():
        if isinstance(names, str):
            for name in names.split():
                found = list(_spellings(name, rule))
                if not found:
                    raise FlexureError(f"expected the name of an operation of torch, got {name!r}")
                table.update(found)
    for key, rule in rows.items():
        if not isinstance(key, str):
            table[key] = _Spelling(rule, key, inplace_at=_inplace_at(key))
    return table


def carriers_in(args: Any) -> Iterator[Carrying]:
    """The carriers in nested tuples, lists and dicts of arguments, in their order."""
    if isinstance(args, Carrying):
        yield args
    elif isinstance(args, (tuple, list)):
        for item in args:
            yield from carriers_in(item)
    elif isinstance(args, dict):
        yield from carriers_in(tuple(args.values()))


def primal_of(x: Any) -> Any:
    """The plain value of a carrier; anything else is itself."""
    return x.primal if isinstance(x, Carrying) else x


def with_primals(args: Any) -> Any:
    """Nested arguments with every carrier replaced by its plain value."""
    if isinstance(args, (tuple, list)) and not isinstance(args, torch.Size):
        items = [with_primals(item) for item in args]
        return type(args)(*items) if hasattr(args, "_fields") else type(args)(items)
    if isinstance(args, dict):
        return {key: with_primals(value) for key, value in args.items()}
    return primal_of(args)


def refused(reason: str) -> Rule:
    """A rule for what is refused: the reason, and the remedy."""

    def rule(function: Any, args: Any, kwargs: Any) -> Any:
        raise Unsupported(reason)

    return rule


def by_body(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A rule for Python functions of torch: runs their own body on the carriers."""
    # Their first lines hand a subclass to its rules, which would call them again.
    blind = dict.fromkeys(_DISPATCHERS, lambda *_: False)
    scope = {**function.__globals__, **blind}
    body = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body(*args, **kwargs)


_DISPATCHERS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _from_primal(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return function(*with_primals(args), **with_primals(kwargs))


def _like_primal(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if any(True for _ in carriers_in((args[1:], kwargs))):
        raise Unsupported(_CUT)
    return function(primal_of(args[0]), *args[1:], **kwargs)


_VALUES = (
    "the value depends on the input, and what follows from it (a branch, a mask, an index, a "
    "number) cannot be followed; let masks and branches depend on shapes or constants only"
)
_CUT = "it would drop how the value depends on the input; leave it out"

GENERAL: Mapping[Any, Rule] = {
    # Answered from the primal value: nothing here depends on the values.
    "shape size dim ndim ndimension dtype device layout numel nelement requires_grad is_leaf "
    "is_floating_point is_complex is_signed is_contiguous stride storage_offset element_size "
    "itemsize nbytes get_device is_cuda is_cpu is_mps is_meta is_xpu is_sparse is_quantized "
    "is_nested is_mkldnn is_neg is_conj is_inference is_same_size len result_type "
    "is_shared is_pinned register_hook ": _from_primal,
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty "
    "new_full": _like_primal,
    "bool int index complex item tolist numpy array contains eq ne lt le gt ge "
    "equal allclose isclose isnan isinf isfinite isposinf isneginf any all nonzero argwhere "
    "count_nonzero argmax argmin argsort searchsorted bucketize unique logical_not logical_and "
    "logical_or logical_xor signbit greater less greater_equal less_equal not_equal "
    "is_nonzero": refused(_VALUES),
    Tensor.__float__: refused(_VALUES),
    "detach data": refused(_CUT),
    Tensor.requires_grad_: refused("ask for gradients of the input instead"),
}
"""Rows that every subclass shares: queries, and what no carrier can pass."""


@dataclass(frozen=True)
class _Spelling:
    """One Python-level function as a form of an operation.

    Attributes:
        rule: of the operation.
        function: the same, out of place.
        writes: whether it overwrites its first argument.
        reflected: whether its two arguments are swapped.
        inplace_at: position of its parameter `inplace`, if it has one.
    """

    rule: Rule
    function: Any
    writes: bool = False
    reflected: bool = False
    inplace_at: int | None = None

    def run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if kwargs.pop("out", None) is not None:
            raise Unsupported("out= writes into a tensor that carries nothing; leave it out")
        kwargs = {_FORMAL.get(name, name): value for name, value in kwargs.items()}
        first = next((name for name in ("input", "self") if name in kwargs), None)
        if first and self.function is not torch.where:  # where it comes second
            args = (kwargs.pop(first), *args)
        args = tuple(reversed(args)) if self.reflected else tuple(args)
        writes = self.writes
        if self.inplace_at is not None:
            writes = kwargs.pop("inplace", False)
            if len(args) > self.inplace_at:
                writes = args[self.inplace_at]
                args = args[: self.inplace_at] + args[self.inplace_at + 1 :]
        if writes:
            return _overwritten(_writable(args[0]), self.rule(self.function, args, kwargs))
        out = self.rule(self.function, args, kwargs)
        _relate(out, carriers_in((args, kwargs)))
        return out


_FORMAL = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input"}
_FORMAL |= {"x2": "other"}
"""NumPy's names of parameters, which torch's functions take too -> torch's."""


def _relate(out: Any, inputs: Iterable[Carrying]) -> None:
    """Notes which results are views of which inputs."""
    results = list(carriers_in(out))
    for x in inputs:
        for y in results:
            if y is not x and _storage(y) == _storage(x):
                y._family = x._family
                y._family.append(ref(y))


def _storage(x: Carrying) -> int:
    plain = x.primal
    while torch._C._functorch.is_functorch_wrapped_tensor(plain):
        plain = torch._C._functorch.get_unwrapped(plain)
    return int(plain.untyped_storage()._cdata)


def _writable(x: Any) -> Carrying:
    """`x`, if it may be overwritten."""
    if not isinstance(x, Carrying):
        raise Unsupported(
            "it writes what depends on the input into a tensor that carries nothing; build the "
            "result with torch.stack, torch.cat or torch.where instead"
        )
    if any((y := member()) is not None and y is not x for member in x._family):
        raise Unsupported(
            "it overwrites a tensor that shares memory with another one in use; write it out of "
            "place, or clone first"
        )
    return x


def _overwritten(x: Carrying, out: Any) -> Carrying:
    """`x`, with the value `out` from now on."""
    out = out if isinstance(out, Carrying) else x.constant(out)
    if out.primal.shape != x.primal.shape:
        raise Unsupported(
            f"the result of shape {tuple(out.primal.shape)} does not fit into the input of shape "
            f"{tuple(x.primal.shape)}; write it out of place"
        )
    if out.primal.dtype != x.primal.dtype:
        out = out.to(x.primal.dtype)
    x.primal, x.carried = out.primal, out.carried
    x._family = [ref(x)]
    return x


def _spellings(name: str, rule: Rule) -> Iterator[tuple[Any, _Spelling]]:
    """The functions that have a name, with what distinguishes them."""
    plain = None
    for space in (Tensor, torch, torch.special, torch._C._nn, F):
        found = getattr(space, name, None)
        if isinstance(found, (types.GetSetDescriptorType, property)):
            plain = operator.attrgetter(name)
            yield found.__get__, _Spelling(rule, plain)
        elif callable(found) and not isinstance(found, type):
            plain = found
            yield found, _Spelling(rule, found, inplace_at=_inplace_at(found))
    for space in (Tensor, torch, F):
        found = getattr(space, f"{name}_", None)
        if callable(found):
            yield found, _Spelling(rule, plain or found, writes=True)
    symbol = getattr(operator, name, getattr(operator, f"{name}_", plain))
    for form, settings in _OPERATORS.items():
        found = getattr(Tensor, form.format(name), None)
        if callable(found):
            form_of = {"writes": True} if name == "setitem" else settings
            yield found, _Spelling(rule, symbol or found, **form_of)


_OPERATORS: Mapping[str, Mapping[str, bool]] = {
    "__{}__": {},
    "__r{}__": {"reflected": True},
    "__i{}__": {"writes": True},
}


def _inplace_at(function: Any) -> int | None:
    if not isinstance(function, types.FunctionType):
        return None
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None
