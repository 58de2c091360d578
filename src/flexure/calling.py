"""How flexure calls other people's models and data: examples, outputs, batches, modes, seeds.

Knows nothing of activations or methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from flexure.contracts import Batches, FlexureError

__all__ = [
    "as_batches",
    "call_model",
    "check_logits",
    "copied",
    "evaluating",
    "logits_of",
    "map_tensors",
    "margin",
    "rewritten_weights",
    "rows_of",
    "seeded",
    "take",
    "unwritten",
]


def as_batches(batches: Batches) -> Batches:
    """`batches`, made safe to iterate more than once: a one-pass iterator becomes a list."""
    return list(batches) if iter(batches) is batches else batches


def call_model(model: nn.Module, x: Any) -> Any:
    """Calls `model` on an `Example`."""
    if isinstance(x, dict):
        return model(**x)
    if isinstance(x, tuple):
        return model(*x)
    return model(x)


def copied(example: Any) -> Any:
    """An `Example` whose tensors a model may overwrite without touching the caller's."""
    if isinstance(example, torch.Tensor):
        return example.detach().clone()
    if isinstance(example, dict):
        return {key: copied(value) for key, value in example.items()}
    if isinstance(example, tuple):
        return tuple(copied(value) for value in example)
    return example


def map_tensors(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`x` (an `Example`) with every tensor in it changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, dict):
        return {key: map_tensors(value, change) for key, value in x.items()}
    if isinstance(x, tuple | list):
        items = [map_tensors(value, change) for value in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x


def rows_of(leaf: Tensor) -> int | None:
    """How many samples a tensor holds; None for a scalar."""
    return leaf.shape[0] if leaf.dim() else None


def take(x: Any, rows: slice, batch: int) -> Any:
    """Some samples of a batch: rows of every tensor in it that has `batch` of them."""
    return map_tensors(x, lambda leaf: leaf[rows] if rows_of(leaf) == batch else leaf)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, or its `.logits`.

    Raises:
        FlexureError: the output is neither.
    """
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise FlexureError(
            f"expected the model to return a tensor or an object with .logits, got "
            f"{type(output).__name__}; wrap the model so that it returns logits"
        )
    return logits


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """m = z_y − z_k − log1p(Σ_{j≠y,k} exp(z_j − z_k)), k the strongest wrong class: (B,).

    The log-odds of the label: cross-entropy is softplus(−m), the label's probability σ(m). Exact
    to rounding for confidently right and wrong samples alike, where logsumexp over all classes
    cancels.

    Args:
        logits: (B, K), K >= 2.
        y: (B,) int64 labels.
    """
    own = y[:, None]
    wrong = logits.scatter(1, own, -torch.inf)
    strongest, k = wrong.max(1, keepdim=True)
    rest = (logits - strongest).scatter(1, own, -torch.inf).scatter(1, k, -torch.inf)
    return (logits.gather(1, own) - strongest).squeeze(1) - torch.log1p(rest.exp().sum(1))


def check_logits(logits: Tensor, y: Tensor | None) -> Tensor:
    """The logits (B, K), once they are of at least two classes, and the labels (B,) among them.

    Raises:
        FlexureError: they are not.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise FlexureError(
            f"expected logits (B, classes) of at least 2 classes, got shape "
            f"{tuple(logits.shape)}; give field=, a function of the input with one value a sample"
        )
    if y is not None and (y.shape != logits.shape[:1] or _outside(y, logits.shape[1])):
        raise FlexureError(
            f"expected (B,) labels from 0 to {logits.shape[1] - 1}, got shape {tuple(y.shape)} "
            f"from {int(y.min())} to {int(y.max())}; give the labels that the model was trained on"
        )
    return logits


def _outside(y: Tensor, classes: int) -> bool:
    return bool(((y < 0) | (y >= classes)).any())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module inside, each module's own mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    with suppress(NotImplementedError):  # an exported graph has one mode, built in
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unwritten(model: nn.Module, *, differentiated: bool = False) -> Iterator[None]:
    """Puts back, bit for bit, what a call of the model writes into the model.

    Covers buffers, the weights that torch's own layers overwrite (`rewritten_weights`), and
    whatever a module binds to its attributes (counters, caches). Another parameter that the call
    overwrites, and a list or dict that it changes in place, are not covered.

    Args:
        model: any.
        differentiated: whether graphs made here, or before, are used afterwards. The model then
            has copies of its buffers inside: autograd refuses a graph of which a buffer has been
            overwritten, be it by the same values.
    """
    modules = [
        (module, _attributes(module), dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    overwritten = (*model.buffers(), *rewritten_weights(model).values())
    contents = {
        id(tensor): (tensor, tensor.detach().clone())
        for tensor in overwritten
        if not tensor.is_meta
    }
    copies: dict[int, Tensor] = {}
    try:
        if differentiated:
            for module, _, buffers in modules:
                for key, buffer in buffers.items():
                    if buffer is not None:
                        copy = copies.setdefault(id(buffer), buffer.detach().clone())
                        module._buffers[key] = copy
        yield
    finally:
        for module, attributes, buffers in modules:
            for key in _attributes(module).keys() - attributes.keys():
                del module.__dict__[key]
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, content in contents.values():
                if not torch.equal(tensor, content):
                    if tensor.shape != content.shape:
                        tensor.resize_(content.shape)
                    tensor.copy_(content)


def rewritten_weights(model: nn.Module) -> dict[str, Tensor]:
    """Path -> weight, of every layer that rewrites its weight when it is called, in eval mode too.

    An embedding with `max_norm` scales down the rows that it looks up, in place.
    """
    return {
        path: module.weight
        for path, module in model.named_modules()
        if isinstance(module, _RENORMALISING) and module.max_norm is not None
    }


_RENORMALISING = (nn.Embedding, nn.EmbeddingBag)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps besides parameters, buffers, children and hooks."""
    return {
        key: value
        for key, value in module.__dict__.items()
        if not (key.startswith("_") and key in _OWN)
    }


_OWN = frozenset(nn.Module().__dict__)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The generator that layers draw their initial weights from starts at `seed` inside.

    That is the CPU's default generator; it is put back afterwards. Accelerators' generators stay
    as they are: `torch.manual_seed` would reseed them too, and they would not be put back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
