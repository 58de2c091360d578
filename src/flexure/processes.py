"""Several processes at one task: shares of a batch, and sums, means and copies across them.

Every process holds the whole model. What is computed from a share is not known here. Before each
exchange all processes say what they are about to do, so that an error in one, or another course
of one, ends all of them instead of leaving the others waiting.
"""

from __future__ import annotations

import os
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexure.contracts import DataError, FlexureError

__all__ = ["Processes", "current_processes"]

_Value = TypeVar("_Value")

_BUCKET = 2**23
"""Elements sent at once (32 MiB of float32): enough to hide the latency, little to hold twice."""

_SENT_AS = {
    torch.bool: torch.uint8,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
"""Dtypes that a sum would round, or that some backends cannot send."""

_FAILED = -1.0
"""What a process says before an exchange that it will not take part in."""

_TEXT = 300
"""Bytes of what a process says of itself."""


class _OtherProcessError(FlexureError):
    """Raised where every process knows already."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        index: of this process, from 0.
        count: of processes.
        device: where tensors must be to be sent; None: anywhere.
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.index == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, an error in one process is raised there, and told to all others.

        They raise at their next exchange. It does not see into exchanges that are not made here,
        such as those of `SyncBatchNorm`: an error of one process just before such a one leaves the
        others waiting for it.

        Raises:
            FlexureError: another process has failed, or does something else; the message names it.
        """
        try:
            yield
            self._meet("the end")
        except _OtherProcessError:
            raise
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            with suppress(RuntimeError):  # a lost connection must not hide the error
                self._say(_FAILED, f"{type(error).__name__}: {first_line}")
            raise

    def share(self, rows: int) -> slice:
        """The contiguous rows of a global batch that are this process's, at most one more or less.

        Raises:
            DataError: there are fewer rows than processes.
        """
        if rows < self.count:
            raise DataError(
                f"expected at least one sample for each of the {self.count} processes in every "
                f"batch, got {rows}; drop the last batch, or use larger batches or fewer processes"
            )
        return self.part(rows)

    def part(self, rows: int) -> slice:
        """Like `share`, but possibly empty."""
        return slice(rows * self.index // self.count, rows * (self.index + 1) // self.count)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums of numbers over the processes, in float64; the same bits on each."""
        if self.count == 1:
            return list(values)
        self._meet(f"a sum of {len(values)} numbers")
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes, without a graph."""
        total = value.detach().clone()
        self.sum_in_place([total])
        return total

    def sum_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes."""
        if self.count > 1:
            given = self._met("a sum", tensors)
            _in_buckets(given, torch.distributed.all_reduce, self.device)

    def average_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Replaces floating-point tensors by their means over the processes, others by the first's.

        Arguments:
            tensors: of the same shapes and dtypes on every process.
        """
        if self.count == 1:
            return
        given = self._met("a mean", tensors)
        _in_buckets([t for t in given if t.is_floating_point()], self._average, self.device)
        self.copy_first([t for t in given if not t.is_floating_point()])

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the values of the first."""
        if self.count > 1:
            given = self._met("a copy", tensors)
            _in_buckets(given, lambda flat: torch.distributed.broadcast(flat, 0), self.device)

    def gathered(self, value: _Value, what: str) -> list[_Value]:
        """The values of all processes, in their order.

        Args:
            value: what can be pickled; its tensors should be on the CPU.
            what: it is, in words: processes that gather something else at the time end all.

        Raises:
            FlexureError: it cannot be pickled.
        """
        if self.count == 1:
            return [value]
        try:  # before the others wait for it
            given = pickle.dumps(value)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise FlexureError(
                f"expected {what} that can be sent to other processes, got: {error}; define their "
                f"classes at the top of a module"
            ) from error
        self._meet(f"gathering {what}")
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, given)
        return [pickle.loads(each) for each in found]

    def wait(self) -> None:
        """Returns when every process is here."""
        self.sums([0.0])

    def _average(self, flat: Tensor) -> None:
        torch.distributed.all_reduce(flat)
        flat /= self.count

    def _met(self, doing: str, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors, once every process is about to do the same with as many of them."""
        given = list(tensors)
        self._meet(f"{doing} of {sum(t.numel() for t in given)} elements in {len(given)} tensors")
        return given

    def _meet(self, doing: str) -> None:
        """Returns when every process is about to do the same, or raises on each."""
        said = self._say(float(zlib.crc32(doing.encode())), doing)
        failed = {i: text for i, (code, text) in enumerate(said) if code == _FAILED}
        if failed:
            where = "; ".join(f"process {i}: {text}" for i, text in failed.items())
            raise _OtherProcessError(
                f"expected all {self.count} processes to go on, got an error in another one "
                f"({where}); mend that one"
            )
        if len({code for code, _ in said}) > 1:
            where = "; ".join(f"process {i}: {text}" for i, (_, text) in enumerate(said))
            raise _OtherProcessError(
                f"expected all {self.count} processes to do the same, got different courses "
                f"({where}); let batches, penalties and settings not depend on the process"
            )

    def _say(self, code: float, text: str) -> list[tuple[float, str]]:
        """What every process says; the texts only where not all codes are the same."""
        if self.count == 1:
            return [(code, "")]
        codes = torch.zeros(self.count, dtype=torch.float64, device=self.device)
        codes[self.index] = code
        torch.distributed.all_reduce(codes)
        said = codes.tolist()
        if len(set(said)) == 1 and _FAILED not in said:
            return [(each, "") for each in said]
        letters = torch.zeros(self.count, _TEXT, dtype=torch.int32, device=self.device)
        own = list(text.encode()[:_TEXT])
        letters[self.index, : len(own)] = torch.tensor(own, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(letters)
        texts = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in letters.tolist()]
        return list(zip(said, texts, strict=True))


def current_processes() -> Processes:
    """The processes that a launcher (`accelerate launch`, `torchrun`) or the caller has started.

    Raises:
        FlexureError: a launcher has started several, but they do not know each other.
    """
    distributed = torch.distributed
    if not distributed.is_available():
        return Processes()
    if not distributed.is_initialized():
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # Without this, processes that torchrun starts on a machine without GPUs are not connected.
        on_cpu = not torch.accelerator.is_available()
        PartialState(cpu=on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
    if not distributed.is_initialized():
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1:
            raise FlexureError(
                f"expected the {launched} processes of this launch to be connected, got none that "
                f"is; on CPUs create accelerate.Accelerator(cpu=True), not Accelerator()"
            )
        return Processes()
    nccl = distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
    return Processes(distributed.get_rank(), distributed.get_world_size(), device)


def _in_buckets(
    tensors: Iterable[Tensor], change: Callable[[Tensor], object], device: torch.device | None
) -> None:
    """Applies a collective operation to many tensors, few of them at a time as one flat tensor."""
    for bucket in _buckets(tensors):
        sent_as = _SENT_AS.get(bucket[0].dtype, bucket[0].dtype)
        flat = torch.cat([t.detach().reshape(-1) for t in bucket]).to(device, sent_as)
        change(flat)
        pieces = torch.split(flat, [t.numel() for t in bucket])
        for tensor, piece in zip(bucket, pieces, strict=True):
            tensor.detach().copy_(piece.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, until a bucket is full."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if not alike or sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
