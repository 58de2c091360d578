"""`flexure sites`: every activation of a network."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import Tensor

from flexure.cli.common import AsJson, BatchSize, Device, Model, Seed, load, print_json, users_code
from flexure.contracts import FlexureError, LoadedModel, SiteError
from flexure.data import load_data
from flexure.surgery import sites as find_sites

__all__ = ["sites"]

_ANOTHER_EXAMPLE = "the example was a random image: give --data or --input-shape"


def sites(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Data address to take the example from.")] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one model input, such as 3,224,224.")
    ] = None,
    device: Device = "cpu",
    batch_size: BatchSize = 1,
    seed: Seed = 42,
    as_json: AsJson = False,
) -> None:
    """List every activation: what steering would change, what it cannot, on which axis."""
    with users_code():
        loaded = load(model, device)
        example = _example(loaded, data, input_shape, batch_size, seed).to(device)
        try:
            report = find_sites(loaded.model, example)
        except SiteError as error:
            remedy = "" if data or input_shape else "; " + _ANOTHER_EXAMPLE
            raise FlexureError(f"{error}{remedy}") from error
    if as_json:
        print_json({"sites": report.rows(), "summary": report.summary})
    else:
        typer.echo(str(report))


def _example(
    loaded: LoadedModel, data: str | None, shape: str | None, size: int, seed: int
) -> Tensor:
    """A batch to find the sites with: given data, a given shape, or a random image."""
    generator = torch.Generator().manual_seed(seed)
    if data is not None:
        items = load_data(data)["train"]
        return torch.stack([loaded.preprocess(items[i]) for i in range(min(size, len(items)))])
    if shape is not None:
        try:
            sizes = [int(part) for part in shape.split(",")]
            if min(sizes) < 1:
                raise ValueError
            return torch.randn(size, *sizes, generator=generator)
        except (ValueError, TypeError, OverflowError, RuntimeError):  # the latter: out of memory
            raise FlexureError(
                f"expected --input-shape like 3,224,224 that fits in memory, got {shape!r}"
            ) from None
    image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    try:
        return torch.stack([loaded.preprocess(image)] * size)
    except Exception as error:  # whatever the user's own preprocessing raises
        raise FlexureError(f"preprocessing failed: {error}; {_ANOTHER_EXAMPLE}") from error
