"""`flexure attack`: accuracy under attacks and corruptions, and the dial that is most robust.

Here are the options alone; the three jobs are in the `attack_*.py` beside.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from flexure.attacks.catalogue import ATTACKS
from flexure.cli.attack_corruptions import Corruptions
from flexure.cli.attack_jobs import Job, Subject, perform
from flexure.cli.attack_plain import SAMPLES, PlainAttack, radii_of
from flexure.cli.attack_sweep import MATCHES, NONE, Sweep, Swept
from flexure.cli.chosen import SPLITS
from flexure.cli.common import AsJson, BatchSize, Device, Model, Resume, Seed, Size
from flexure.contracts import FlexureError
from flexure.data import CORRUPTIONS
from flexure.data.corruptions import SEVERITIES
from flexure.methods.attack_model import PROTOCOLS, RADII
from flexure.methods.attack_model_result import radius_text
from flexure.methods.robust_dial import DIAL_BETAS, DIAL_CS
from flexure.methods.robust_dial_moves import SEARCHES

__all__ = ["attack"]

_ATTACKS = ("apgd-ce",)
_TOLD_RADII = " ".join(
    f"{norm}:{','.join(radius_text(eps, norm) for eps in radii)}" for norm, radii in RADII.items()
)
_BETAS, _CS, _SEVERITIES = (
    ",".join(f"{value:g}" for value in values) for values in (DIAL_BETAS, DIAL_CS, SEVERITIES)
)
_SWEEP, _CORRUPTIONS = "With --sweep", "With --corruptions"


def attack(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Data address: sklearn:digits, npz:FILE, idx:DIR, folder:DIR, hf:NAME.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None, typer.Option(help="Address of another model, for the same samples.")
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
    after: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a finished --sweep of MODEL: its dial, on the samples that it reported "
            "on."
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
        int | None,
        typer.Option(
            min=1,
            max=1_000_000_000,
            help="How many samples to draw at random from the split, all if it has no more.",
            show_default=f"{SAMPLES}; all with --corruptions",
        ),
    ] = None,
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            help=f"May be repeated: each gets what withstood those before. One of "
            f"{', '.join(ATTACKS)}. The default takes minutes on a CPU; for numbers to publish, "
            f"autoattack.",
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
        bool, typer.Option("--masking", help="Look for masked gradients of MODEL too.")
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
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Search the dial that is most robust on validation data, report it on test data, "
            "and save it as an adapter.",
            rich_help_panel=_SWEEP,
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="Radius that the dial is chosen for.",
            show_default="1/255 in linf, 0.1 in l2",
            rich_help_panel=_SWEEP,
        ),
    ] = None,
    betas: Annotated[
        str, typer.Option(help="Of one dial for all sites.", rich_help_panel=_SWEEP)
    ] = _BETAS,
    cs: Annotated[
        str, typer.Option(help="Of one dial for all sites.", rich_help_panel=_SWEEP)
    ] = _CS,
    match: Annotated[
        str,
        typer.Option(
            help=f"What calibration keeps, with commas; {NONE}: not calibrated.",
            rich_help_panel=_SWEEP,
        ),
    ] = f"{NONE},mean,mean+std",
    groups: Annotated[
        str,
        typer.Option(
            help=f"Sites that share a dial in the second search: layers, sites, or {NONE}: no "
            f"second search, as by --search {NONE}.",
            rich_help_panel=_SWEEP,
        ),
    ] = "layers",
    search: Annotated[
        str,
        typer.Option(help=f"By groups: {', '.join(SEARCHES)} or {NONE}.", rich_help_panel=_SWEEP),
    ] = "evolutionary",
    budget: Annotated[
        int,
        typer.Option(
            min=1, max=1_000_000, help="Candidates of each start of it.", rich_help_panel=_SWEEP
        ),
    ] = 120,
    starts: Annotated[
        int,
        typer.Option(
            min=1,
            max=len(MATCHES),
            help="Dials that it starts from: the best of so many kinds of calibration.",
            rich_help_panel=_SWEEP,
        ),
    ] = 1,
    clean_loss: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of clean accuracy that may be lost.",
            rich_help_panel=_SWEEP,
        ),
    ] = 0.01,
    val_size: Size = None,
    test_size: Size = None,
    corruptions: Annotated[
        bool,
        typer.Option(
            "--corruptions",
            help="Corrupt images instead: common corruptions, which no adversary chose.",
            rich_help_panel=_CORRUPTIONS,
        ),
    ] = False,
    corruption: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be repeated. One of {', '.join(CORRUPTIONS)}.",
            show_default="the fifteen common ones",
            rich_help_panel=_CORRUPTIONS,
        ),
    ] = None,
    severities: Annotated[
        str, typer.Option(help="With commas.", rich_help_panel=_CORRUPTIONS)
    ] = _SEVERITIES,
    corruption_files: Annotated[
        str | None,
        typer.Option(
            help="Official files instead of generated ones: cifar10-c:DIR, cifar100-c:DIR or "
            "imagenet-c:DIR; the data are their clean images in the same order.",
            rich_help_panel=_CORRUPTIONS,
        ),
    ] = None,
    shift: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=ADDRESS of another version of all images in the same order; may be "
            "repeated.",
            rich_help_panel=_CORRUPTIONS,
        ),
    ] = None,
    device: Device = "cpu",
    batch_size: BatchSize = 128,
    seed: Seed = 42,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Attack a network with growing radius, or corrupt its images, or search a robust dial."""
    _check_given(context, sweep=sweep, corruptions=corruptions)
    radii = radii_of(eps) if eps else {norm: list(each) for norm, each in RADII.items()}
    names = attacks or list(_ATTACKS)
    job: Job = PlainAttack(names, radii, every, masking, certify, protocol)
    if corruptions:
        job = Corruptions.told(
            names=corruption, severities=severities, files=corruption_files, shifts=shift or []
        )
    if sweep:
        job = Sweep.told(
            eps=radii if eps else {"linf": radii["linf"]}, attacks=names, target=target,
            betas=betas, cs=cs, match=match, groups=groups, search=search, budget=budget,
            starts=starts, clean_loss=clean_loss, val_size=val_size, test_size=test_size,
        )  # fmt: skip
    if after is not None:
        _check_after(after, out, chosen=(steer, adapter, split), files=corruption_files)
        adapter = Swept.read(after).adapter
    subject = Subject(
        model, data, out, against, steer, adapter, after, split, samples, device, batch_size, seed,
        resume, as_json,
    )  # fmt: skip
    perform(job, subject)


_OF_SWEEP = {"target", "betas", "cs", "match", "groups", "search", "budget", "starts",
             "clean_loss", "val_size", "test_size"}  # fmt: skip
_OF_GROUPS = {"groups", "search", "budget", "starts"}
_OF_CORRUPTIONS = {"corruption", "severities", "corruption_files", "shift"}
_OF_ATTACKS = {"attacks", "eps", "every", "masking", "certify", "protocol"}
_OF_ONE_SPLIT = {"against", "steer", "adapter", "after", "split", "samples"}

_REFUSED = {
    (False, False): _OF_SWEEP | _OF_CORRUPTIONS,
    (True, False): _OF_CORRUPTIONS | _OF_ONE_SPLIT | (_OF_ATTACKS - {"attacks", "eps"}),
    (False, True): _OF_SWEEP | _OF_ATTACKS,
}
"""(--sweep, --corruptions) -> the options that mean nothing then."""


def _check_given(context: typer.Context, *, sweep: bool, corruptions: bool) -> None:
    """Refuses options that would be ignored.

    Raises:
        FlexureError: there are some.
    """
    if sweep and corruptions:
        raise FlexureError("expected --sweep or --corruptions, got both; run one after the other")
    job = "--sweep" if sweep else "--corruptions" if corruptions else "an attack"
    none = [name for name in ("groups", "search") if context.params[name] == NONE]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        option = parameter.opts[0]
        if name in _REFUSED[sweep, corruptions]:
            raise FlexureError(f"expected no {option} with {job}; {_remedy(name)}")
        if none and name in _OF_GROUPS and name not in none:
            raise FlexureError(
                f"expected no {option} with --{none[0]} {NONE}, which searches no groups; leave "
                f"one of them out"
            )


def _check_after(after: Path, out: Path, *, chosen: Iterable[object], files: str | None) -> None:
    """Refuses what does not go with the folder of a sweep.

    Raises:
        FlexureError: another model or split, its own folder for results, or files in which images
            are told by their places.
    """
    if any(each is not None for each in chosen):
        raise FlexureError(
            "expected --after alone to say what is attacked, got --steer, --adapter or --split "
            "too; leave them out"
        )
    if after.resolve() == out.resolve():
        raise FlexureError(
            f"expected results in another folder than those of the sweep, got {out} for both; give "
            f"another --out"
        )
    if files is not None:
        raise FlexureError(
            "expected --after without --corruption-files, got both: official files have the first "
            "images, which the sweep may have chosen on; leave one of them out"
        )


def _remedy(name: str) -> str:
    if name in _OF_SWEEP | _OF_CORRUPTIONS:
        return f"add {'--sweep' if name in _OF_SWEEP else '--corruptions'}"
    if name in ("split", "samples"):
        return "give --val-size and --test-size"
    return "leave it out, or make two runs"
