"""Turning a network into a low-curvature network, in place.

What each part becomes, and in which order parts are changed. The layers and units are in
`flexure.layers` and `flexure.units`; the report is in `lcnn_report.py`; training is `fit`'s.

[LCNN] is Low-Curvature Networks (Srinivas et al., 2022).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flexure.calling import call_model, copied, evaluating
from flexure.contracts import Example, FlexureError, SiteError
from flexure.methods.lcnn_layers import Change, linear_changes, norm_changes
from flexure.methods.lcnn_report import Part, check_example, parts_of, remember_parts, report_of
from flexure.methods.placing import unit_arguments
from flexure.models import RESIDUAL_FACTORS
from flexure.models.builder import check_constants
from flexure.surgery.census import check_free, sites
from flexure.surgery.factors import find_factors
from flexure.surgery.follow import first_floating
from flexure.surgery.frames import forget_compiled
from flexure.surgery.install import ROUTED, Plan, install, plan
from flexure.surgery.preserve import preserved
from flexure.surgery.sites import Refusal, Site, SiteReport
from flexure.surgery.sums import find_sums, scale_sums
from flexure.surgery.weight_uses import WeightUses, weight_uses
from flexure.surgery.wrapped import unwrapped_to_train
from flexure.units.catalogue import SPECS
from flexure.units.flat import AveragePooling, LeakySoftplus, Overwriting
from flexure.units.smooth import CenteredSoftplus
from flexure.units.unit import CTU

__all__ = ["PARTS", "to_lcnn"]

PARTS: tuple[str, ...] = ("activation", "linear", "norm")
"""What is converted by default: all that [LCNN] converts, section 3.4."""

Pooling: TypeAlias = Literal["keep", "average"]


def to_lcnn(
    model: nn.Module,
    *,
    example: Example,
    beta: float = 5.0,
    gamma: float = 10.0,
    residual: str = "sum",
    parts: Sequence[str] = PARTS,
    pooling: Pooling = "keep",
    leave: str | Sequence[str] = (),
) -> nn.Module:
    """Turns a network into a low-curvature network ([LCNN] section 3), in place.

    - Every rectifier becomes a centered softplus with a learnable beta of its own, one for each
      call, and so do its smooth relatives: GELU, SiLU, Mish, hardswish and softplus. Leaky ones
      keep their slope on the left; a cap (ReLU6) is dropped. Activations that are bounded or
      saturate (sigmoid, tanh, ELU) stay, and are reported.
    - Every linear layer and convolution is divided by its operator norm, for the size of its
      input.
    - Every BatchNorm's slope is clipped at a learnable gamma. Nothing but their eps bounds the
      slope of other normalisations, such as LayerNorm; they stay, and are reported.
    - Residual sums are multiplied by a factor.
    - What else multiplies a signal (a vector of scales, a buffer, a number) and kinks that are
      written out (`x * (x > 0)`, `torch.where`, `x[x < 0] = 0`, `abs`, `amax`, `round`) stay, and
      are reported as far as Python sees them.

    The network is looked at as it runs on the example in eval mode. What it runs in training mode
    alone is not converted; activations that it calls there as functions are errors then.

    The report is printed, with the Lipschitz bound that results; `flexure.lcnn_report` computes it
    anew. The parameters of the network stay the same objects but for new ones (betas and gammas):
    make the optimiser afterwards. A state dict of the result fits a fresh copy of the model that
    was converted in the same way.

    Args:
        model: convolutional or fully connected; of one that is wrapped (torch.compile, parallel)
            the one inside is converted.
        example: one input, to find activations, layers and their sizes with.
        beta: of the centered softplus at the start (5 in the code of [LCNN]).
        gamma: the largest slope of a BatchNorm at the start (10 there).
        residual: what becomes of residual sums a + b: `"sum"`, nothing, and the branches' constants
            add up; `"mean"`, (a + b)/2; `"sqrt2"`, (a + b)/sqrt(2).
        parts: which of `"activation"`, `"linear"` and `"norm"` to convert, for ablations.
        pooling: `"average"` puts averages over the same windows in the place of max-pooling, whose
            kinks leave no bound on curvature.
        leave: patterns of paths of layers or names of weights that stay as they are although
            nothing bounds their norm, such as an attention's.

    Returns:
        `model`.

    Raises:
        FlexureError: a setting out of range, a network that is an LCNN already, or layers that
            cannot be normalised (the message names them) or have no values yet; or it is called
            inside `torch.inference_mode`. The model is then unchanged.
        SiteError: an activation that cannot be reached, a model whose residual sums cannot be
            followed, or an example that does not run, before or after. The model is then unchanged.

    Example:
        >>> from flexure.models import MLP
        >>> model = to_lcnn(MLP((2, 8, 2)), example=torch.zeros(1, 2))
        part        name    was            is now             constant   note
        ----------  ------  -------------  -----------------  ---------  ----
        activation  body.1  relu           centered softplus  beta 5
        linear      body.0  Linear (8, 2)  norm 1             norm <= 1
        linear      head    Linear (2, 8)  norm 1             norm <= 1
        LCNN: 1 activation, 2 layers normalised; Lipschitz constant at most 1
    """
    _check_settings(beta, gamma, residual, parts, pooling)
    inside = unwrapped_to_train(model)
    _check_new(inside)
    _check_ready(inside, example)
    changes = _changes(
        inside, example, _Settings(beta, gamma, residual, tuple(parts), pooling), leave
    )
    with ExitStack() as undo:
        for change in changes:
            change.make(undo)
        done = tuple(part for change in changes for part in change.parts)
        undo.callback(remember_parts(inside, done))
        report = report_of(inside, done, example)
        undo.pop_all()
    forget_compiled()
    print(report)
    return model


@dataclass(frozen=True)
class _Settings:
    beta: float
    gamma: float
    residual: str
    parts: tuple[str, ...]
    pooling: Pooling


def _check_settings(
    beta: float, gamma: float, residual: str, parts: Sequence[str], pooling: str
) -> None:
    check_constants(beta, gamma)
    for name, value, known in (
        ("residual", residual, tuple(RESIDUAL_FACTORS)),
        ("pooling", pooling, ("keep", "average")),
    ):
        if not isinstance(value, str) or value not in known:
            raise FlexureError(
                f"expected {name} to be one of {', '.join(map(repr, known))}, got {value!r}; "
                f"choose one of them"
            )
    listed = isinstance(parts, Collection) and not isinstance(parts, str)
    if not listed or not parts or any(part not in PARTS for part in parts):
        raise FlexureError(
            f"expected parts to be some of {', '.join(map(repr, PARTS))}, got {parts!r}; give a "
            f"tuple of them"
        )


def _check_new(model: nn.Module) -> None:
    """A second conversion would nest normalisations: refused, whoever made the first."""
    check_free(model)
    if parts_of(model):
        raise FlexureError(
            "expected a network that is no low-curvature network, got one that was converted, or "
            "built as one, already; convert a fresh copy of the original"
        )


def _check_ready(model: nn.Module, example: Example) -> None:
    check_example(example)
    if torch.is_inference_mode_enabled():
        raise FlexureError(
            "expected to_lcnn outside torch.inference_mode, where parameters that are made cannot "
            "be trained, got it inside; convert the model before"
        )
    lazy = [
        path
        for path, module in model.named_modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if nn.parameter.is_lazy(tensor)
    ]
    if lazy:
        raise FlexureError(
            f"expected layers whose weights have shapes, got lazy ones at "
            f"{', '.join(dict.fromkeys(lazy))}; run a batch through the model first"
        )


def _patterns(leave: Any) -> tuple[str, ...]:
    listed = (leave,) if isinstance(leave, str) else leave
    texts = isinstance(listed, Collection) and all(isinstance(each, str) for each in listed)
    if not texts:
        raise FlexureError(
            f"expected leave to be a pattern of paths, or several, got {leave!r}; give strings"
        )
    return tuple(listed)


def _changes(
    model: nn.Module, example: Example, settings: _Settings, leave: str | Sequence[str]
) -> tuple[Change, ...]:
    """Everything that will be changed; looks at everything, and changes nothing."""
    patterns = _patterns(leave)
    report = sites(model, example, pooling=settings.pooling == "average")
    uses = weight_uses(model, example)
    found = [_unit_change(model, example, report, settings)]
    if "linear" in settings.parts:
        found.append(linear_changes(model, uses, patterns))
    elif patterns:
        raise FlexureError("expected leave= with the part 'linear', got it without; drop it")
    if "norm" in settings.parts:
        found.append(norm_changes(model, uses, settings.gamma))
    # Sums are found before, and scaled after the units are in place, whose own sums are none.
    return (
        *found,
        _sum_change(model, example, settings.residual),
        Change(tuple(_written_out(model, example, uses, settings)), lambda undo: None),
    )


def _written_out(
    model: nn.Module, example: Example, uses: WeightUses, settings: _Settings
) -> Iterator[Part]:
    """Factors and kinks in the network's own arithmetic: left."""
    known = {(use.function.strip("_"), use.caller) for use in uses.bare}
    for each in find_factors(model, example):
        kind, part = ("factor", "linear") if each.by else ("activation", "activation")
        if part in settings.parts and not (each.by and (each.function, each.caller) in known):
            name = f"{each.caller or '(model)'}: {each.function}"
            yield Part(kind, name, each.by and f"times {each.by}", note=each.reason)


def _unit_change(
    model: nn.Module, example: Example, report: SiteReport, settings: _Settings
) -> Change:
    """Activations and poolings: a unit at every site, through the site machinery."""
    wanted = "activation" in settings.parts
    blocking = [refusal for refusal in report.refused if refusal.blocking]
    if wanted and blocking:
        listed = "; ".join(f"{r.name or '(model)'}: {r.activation}: {r.reason}" for r in blocking)
        raise SiteError(
            f"expected to reach every rectifier, but cannot convert {listed}; change the model, or "
            f"leave 'activation' out of parts="
        )
    chosen = tuple(s for s in report.sites if wanted or SPECS[s.activation].form == "pool")
    left = [_left(refusal) for refusal in report.refused if wanted or _pools(refusal)]
    if not chosen:
        return Change(tuple(left), lambda undo: None)
    what = plan(report, chosen, complete=len(chosen) == len(report.sites))
    overwrite = _overwriting_matters(model, example, what)

    def make(undo: ExitStack) -> None:
        def unit(site: Site, original: nn.Module | None) -> nn.Module:
            made = _unit(model, site, original, settings.beta)
            # By itself a module's unit does not overwrite, and a routed call does as it did.
            other = site.inplace and overwrite == (site.kind == "module")
            return Overwriting(made, inplace=overwrite) if other else made

        undo.callback(install(model, what, unit).remove)

    return Change((*(_part(site, overwrite) for site in chosen), *left), make)


def _overwriting_matters(model: nn.Module, example: Example, what: Plan) -> bool:
    """Whether the network's output depends on its activations overwriting their inputs.

    If not, and it hardly ever does, units return what they compute: cheaper in training, and
    bounds can follow them.
    """
    if not any(site.inplace for site in what.sites):
        return False

    def run() -> list[Tensor]:
        with preserved(model), evaluating(model), torch.no_grad():
            return [
                x for x in tree_leaves(call_model(model, copied(example))) if isinstance(x, Tensor)
            ]

    before = run()
    placed = install(model, what, lambda site, original: _Copying(site, original))
    try:
        after = run()
    finally:
        placed.remove()
    return not all(map(torch.equal, before, after))


class _Copying(nn.Module):
    """The activation of a site itself, out of place."""

    def __init__(self, site: Site, original: nn.Module | None) -> None:
        super().__init__()
        self.unit = CTU(**unit_arguments(site, original) | {"inplace": False}, beta=1.0)

    def forward(self, x: Tensor, *, inplace: bool = False, **params: Any) -> Tensor:
        return self.unit.reference(x, **params)


def _unit(model: nn.Module, site: Site, original: nn.Module | None, beta: float) -> nn.Module:
    """What stands at a site, on the device of the layers around it."""
    spec, params = SPECS[site.activation], unit_arguments(site, original)["params"]
    if spec.form == "pool":
        return AveragePooling(len(site.shape) - 2, params)
    near = first_floating(model.get_submodule(site.caller), model)
    like: dict[str, Any] = {} if near is None else {"device": near.device, "dtype": near.dtype}
    if spec.form == "leaky":
        return LeakySoftplus(params["slope"], beta, **like)
    return CenteredSoftplus(beta, **like)


def _part(site: Site, overwrite: bool) -> Part:
    path = site.name if site.kind == "module" else f"{ROUTED}.{site.name.replace('.', '/')}"
    if site.inplace and overwrite == (site.kind == "module"):
        path += ".unit"
    form = SPECS[site.activation].form
    if form == "pool":
        return Part("pool", site.name, site.activation, "average of the same windows")
    dropped = "its cap is dropped" if site.params.get("cap") is not None else ""
    became = "leaky softplus" if form == "leaky" else "centered softplus"
    return Part("activation", site.name, site.activation, became, dropped, path)


def _left(refusal: Refusal) -> Part:
    if _pools(refusal):
        why = "Lipschitz, with kinks: no bound on curvature; pooling='average' averages"
        return Part("pool", refusal.name, refusal.activation, note=why)
    spec = SPECS.get(refusal.activation)
    steering = spec is not None and spec.refusal is not None and spec.refusal in refusal.reason
    note = _STAYS.get(refusal.activation, _NO_RECTIFIER) if steering else refusal.reason
    return Part("activation", refusal.name, refusal.activation, note=note)


_NO_RECTIFIER = "no rectifier: it stays, with its kinks if it has any"
_BOUNDED = "bounded on both sides, which softplus is not"
_SATURATES = "saturates at a negative value, which softplus does not"
_STAYS: Mapping[str, str] = {
    **dict.fromkeys(("sigmoid", "tanh", "hardtanh", "hardsigmoid", "softsign"), _BOUNDED),
    **dict.fromkeys(("laplace",), _BOUNDED),
    **dict.fromkeys(("elu", "selu", "celu"), _SATURATES),
    **dict.fromkeys(("glu", "lstm", "gru"), "gated by sigmoids: a product of signals"),
    "erf": "perhaps a part of a GELU by hand, which stays; use nn.GELU",
    "centered_softplus": "smooth already, with a beta of its own",
}
"""Activations that stay: why."""


def _pools(refusal: Refusal) -> bool:
    return "max_pool" in refusal.activation


def _sum_change(model: nn.Module, example: Example, residual: str) -> Change:
    """Residual sums, found in the network as it is now."""
    factor = RESIDUAL_FACTORS[residual]
    report = find_sums(model, example)
    others = tuple(
        Part("sum", f"{each.caller or '(model)'}: {each.name}", "", note=each.reason)
        for each in report.refused
    )
    if residual == "sum":
        note = "the constants of the branches add up"
        sums = tuple(Part("sum", each.name, each.kind, note=note) for each in report.sums)
        return Change((*sums, *others), lambda undo: None)
    if others:
        listed = "\n".join(f"  {each.name}: {each.note}" for each in others)
        raise SiteError(
            f"expected a model whose branches meet in sums that can be followed, got\n{listed}\n"
            f"change the model, or keep its sums as they are with residual='sum'"
        )
    scaled = f"{factor:.4g} (a + b)"
    sums = tuple(Part("sum", each.name, each.kind, scaled, constant=factor) for each in report.sums)

    def make(undo: ExitStack) -> None:
        if sums:
            undo.callback(scale_sums(model, report, factor).remove)

    return Change(sums, make)
