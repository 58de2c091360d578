"""`flexure attack`: accuracy under attacks, of a network or of two side by side."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flexure.attacks.bounded import Bounded
from flexure.attacks.catalogue import ATTACKS
from flexure.cli.chosen import (
    SPLITS,
    Space,
    described,
    dials_of,
    drawn,
    output,
    side_by_side,
    space,
)
from flexure.cli.common import (
    AsJson,
    BatchSize,
    Device,
    Model,
    Resume,
    Seed,
    check_takes,
    discard,
    load,
    print_json,
    resumable,
    users_code,
    working,
)
from flexure.contracts import FlexureError, LoadedModel
from flexure.data import batches, load_data
from flexure.methods.attack_model import PROTOCOLS, RADII, attack_model
from flexure.methods.attack_model_result import AttackReport, radius_text
from flexure.record import record, write_json

__all__ = ["attack"]

_STORE = ".flexure-attack"  # in the output folder, while an attack is unfinished
_ATTACKS = ("apgd-ce",)
_TOLD_RADII = " ".join(
    f"{norm}:{','.join(radius_text(eps, norm) for eps in radii)}" for norm, radii in RADII.items()
)


def attack(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Data address: sklearn:digits, npz:FILE, idx:DIR, folder:DIR, hf:NAME.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="Address of another model, attacked in the same way on the same samples."
        ),
    ] = None,
    steer: Annotated[
        str | None,
        typer.Option(
            help="BETA or BETA,C: steer MODEL there first; without --against it is compared with "
            "itself unsteered."
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a saved adapter to put into MODEL first; without --against it is "
            "compared with itself without."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("flexure-attack"),
    split: Annotated[
        str | None,
        typer.Option(
            help=f"Split of the data; default: the first there is of {', '.join(SPLITS)}."
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            max=1_000_000_000,
            help="How many samples to draw at random from the split, all if it has no more.",
        ),
    ] = 256,
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            help=f"May be repeated: each gets what withstood those before. One of "
            f"{', '.join(ATTACKS)}.",
            show_default=", ".join(_ATTACKS),
        ),
    ] = None,
    eps: Annotated[
        list[str] | None,
        typer.Option(
            help="NORM:RADII with commas, such as linf:1/255,2/255 or l2:0.25; without NORM: linf. "
            "May be repeated.",
            show_default=_TOLD_RADII,
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--every",
            help="Run each attack on all samples that are right, not on survivors alone: slower, "
            "and tells the accuracy under each attack alone.",
        ),
    ] = False,
    masking: Annotated[
        bool, typer.Option("--masking", help="Look for masked gradients too.")
    ] = False,
    certify: Annotated[
        bool,
        typer.Option(
            "--certify", help="Certify l2 radii too, by a bound of the Lipschitz constant."
        ),
    ] = False,
    protocol: Annotated[
        str,
        typer.Option(
            help="standard; or published: beside it the evaluation of Curvature Tuning's code, in "
            "the space of normalised inputs, which is not an l_p robustness."
        ),
    ] = PROTOCOLS[0],
    device: Device = "cpu",
    batch_size: BatchSize = 128,
    seed: Seed = 42,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Attack a network, or two, with growing radius; write results and report."""
    settings: dict[str, Any] = {
        "attacks": attacks or list(_ATTACKS),
        "eps": radii_of(eps) if eps else dict(RADII),
        "every": every,
        "masking": masking,
        "certify": certify,
        "protocol": _protocols(protocol),
        "batch_size": batch_size,
        "seed": seed,
    }
    dials = None if steer is None else dials_of(steer)
    with (
        output(out, _STORE) as store,
        working(store, "attack", resume=resume),
        users_code(),
        resumable(),
    ):
        loaded = load(model, device)
        other = None if against is None else load(against, device)
        chosen, split = drawn(load_data(data), split, samples, seed)
        own = space(loaded, chosen)
        _warn_of(own, loaded)
        ready = partial(batches, batch_size=batch_size, device=device, cache=True)
        given = ready(chosen, preprocess=own.prepare)
        for each in (loaded, other):
            if each is not None:
                check_takes(each, given)
        pair = side_by_side(loaded, other, dials, adapter, given, beside_adapter=True)
        found = attack_model(
            _bounded(pair.model, own),
            given,
            reference=None
            if pair.against is None
            else _bounded(pair.against, own if other is None else space(other, chosen)),
            names=pair.names,
            **settings,
            resume=store,
            progress=not as_json and sys.stderr.isatty(),
        )
    config = {
        "model": model, "data": data, "against": against, "steer": steer, "adapter": adapter,
        "names": pair.names, "split": split, "samples": len(chosen), **settings,
        "preprocess": described(loaded), "device": device,
    }  # fmt: skip
    payload = record(config=config, seed=seed, numbers=found.to_dict())
    write_json(out / "results.json", payload)
    _write_page(out / "report.html", found, payload, chosen.classes)
    discard(store)
    if as_json:
        print_json(payload)
    else:
        _print(found, out)


def radii_of(texts: Sequence[str]) -> dict[str, list[float]]:
    """Norm -> radii, of `linf:1/255,2/255` and the like.

    Raises:
        FlexureError: something else.
    """
    found: dict[str, list[float]] = {}
    for text in texts:
        norm, _, rest = text.rpartition(":")
        try:
            radii = [_fraction(part) for part in rest.split(",")]
        except (ValueError, ZeroDivisionError):
            raise FlexureError(
                f"expected --eps like linf:1/255,2/255 or l2:0.25, got {text!r}; give a norm and "
                f"radii with commas between"
            ) from None
        found.setdefault(norm.strip() or "linf", []).extend(radii)
    return found


def _fraction(text: str) -> float:
    above, slash, below = text.partition("/")
    return float(above) / float(below) if slash else float(above)


def _protocols(name: str) -> list[str]:
    """The standard one always; the published one beside it."""
    if name not in PROTOCOLS:
        raise FlexureError(
            f"expected --protocol {' or '.join(PROTOCOLS)}, got {name!r}; choose one of them"
        )
    return list(dict.fromkeys([PROTOCOLS[0], name]))


def _bounded(model: torch.nn.Module, own: Space) -> Bounded:
    return Bounded(model, mean=own.mean, std=own.std, bounds=own.bounds)


def _warn_of(own: Space, loaded: LoadedModel) -> None:
    if own.bounds is None:
        warnings.warn(
            f"{loaded.address}: its inputs have no bounds that are known; radii are in units of "
            f"its own inputs, {described(loaded)}",
            stacklevel=2,
        )


def _write_page(
    path: Path, found: AttackReport, payload: dict[str, Any], classes: Sequence[str]
) -> None:
    from flexure.report import run_table
    from flexure.report.attack import attack_page

    title = f"{payload['config']['model']} attacked on {payload['config']['data']}"
    attack_page(path, found, title=title, run=run_table(payload), classes=classes)


def _print(found: AttackReport, out: Path) -> None:
    typer.echo(str(found))
    typer.echo(f"Report:  {out / 'report.html'}")
    typer.echo(f"Results: {out / 'results.json'}")
