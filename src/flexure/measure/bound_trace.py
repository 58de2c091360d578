"""Running a network on carriers of bounds: one input of zeros, eval mode, everything put back.

A network that draws random numbers on the way is refused: a bound is one of a fixed function.

What the carriers do is in `bound_catalogue.py`; what is made of the graph that they leave, in
`bounds.py` and `lipschitz.py`.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flexure.calling import logits_of
from flexure.contracts import FlexureError
from flexure.measure.bound_catalogue import Bounding
from flexure.measure.bound_rules import Signal
from flexure.measure.fields import measuring
from flexure.measuring import unchanged_randomness, uncompiled

__all__ = ["bounded", "nothing_drawn"]

T = TypeVar("T")


def bounded(
    model: nn.Module,
    input_shape: Sequence[int],
    carrier: type[Bounding],
    bounds: Callable[[Signal], T],
) -> T:
    """`bounds` of the node of the logits, in the graph of one forward pass.

    Raises:
        FlexureError: an operation that the carrier refuses; or the model does not take the input,
            draws random numbers, or its output is not (1, K).
    """
    x = _zeros(model, input_shape)
    with unchanged_randomness(x.device), measuring(model), torch.no_grad(), uncompiled():
        with nothing_drawn(model, x.device):
            output = _traced(model, carrier.at(x))
        return bounds(output)


@contextmanager
def nothing_drawn(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a model is called that is to draw no random numbers.

    Seen are the global generators of torch, Python and NumPy, and `torch.Generator`s that are
    attributes of its modules.

    Raises:
        FlexureError: at the end, one of them has moved.
    """
    before = _generators(model, device)
    yield
    if _generators(model, device) != before:
        raise FlexureError(
            "expected a network that is a fixed function of its input, got one that draws random "
            "numbers in eval mode; remove the noise (functional dropout needs "
            "training=self.training): what is bounded must be the same at each call"
        )


def _generators(model: nn.Module, device: torch.device) -> list[Any]:
    """The states of the generators that a model can draw from, to be compared."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(getattr(torch, device.type).get_rng_state(device))
    own = [each for module in model.modules() for each in vars(module).values()]
    states += [each.get_state() for each in own if isinstance(each, torch.Generator)]
    numpy = sys.modules.get("numpy")
    told = [repr(random.getstate())]
    if numpy:
        kind, words, *rest = numpy.random.get_state()
        told.append(repr((kind, words.tobytes(), rest)))
    return [*told, *(state.cpu().numpy().tobytes() for state in states)]


def _zeros(model: nn.Module, input_shape: Any) -> Tensor:
    """One input, of the dtype and on the device of the model's weights."""
    if not isinstance(input_shape, Sequence) or not all(
        isinstance(size, int) and size >= 0 for size in input_shape
    ):
        raise FlexureError(
            f"expected input_shape to be the sizes of one input, got {input_shape!r}; give "
            f"for example (3, 32, 32)"
        )
    held = itertools.chain(model.parameters(), model.buffers())
    like = next((each for each in held if each.is_floating_point()), torch.zeros(()))
    return like.detach().new_zeros((1, *input_shape))


def _traced(model: nn.Module, x: Bounding) -> Signal:
    """The node of the logits, in the graph of one forward pass."""
    try:
        logits = logits_of(model(x))
    except RuntimeError as error:
        raise FlexureError(
            f"expected a model that takes one input of shape {tuple(x.shape)}, got an error "
            f"({error}); give input_shape without the batch dimension"
        ) from error
    if not isinstance(logits, Bounding):
        raise FlexureError(
            "expected logits that depend on the input by operations that a "
            f"{x.subject} can follow, got none that do; give the network itself"
        )
    if logits.primal.dim() != 2 or len(logits.primal) != 1:
        raise FlexureError(
            f"expected logits of shape (1, K) for one input, got {tuple(logits.primal.shape)}; "
            f"give input_shape without the batch dimension, and a model that keeps it"
        )
    return logits.carried
