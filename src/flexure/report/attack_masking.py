"""Whether gradients can be believed, in a report: the verdict, its checks, and the loss surface.

Reads a finished `MaskingReport`; what is suspicious was decided there.
"""

from __future__ import annotations

from flexure.attacks.masking_result import LossSurface, MaskingCheck, MaskingReport
from flexure.methods.attack_model_result import radius_text
from flexure.report.attack_curves import NORMS, eps_scale, radius_axis
from flexure.report.attack_lines import Line, labelled_lines
from flexure.report.attack_surfaces import Ray, Spread, Surface, rays, spreads, surfaces
from flexure.report.canvas import Picture
from flexure.report.log_axes import drawable
from flexure.report.page import Section
from flexure.report.plots import Estimate
from flexure.report.tables import percent, table_of

__all__ = ["masking_sections", "masking_sentence"]

_SHOWN = 6  # samples with a loss surface
_WORDS = {True: "suspicious", False: "in\N{NO-BREAK SPACE}order", None: "skipped"}
_MEANING = {
    "masked": "Attacks that follow the gradient fail here for a reason other than robustness: "
    "accuracies under them say nothing of this network.",
    "not masked": "No check found a sign of masked gradients. That is no proof that there are "
    "none, nor that attacks found all there is.",
    "undecided": "There are signs that are no proof, or checks that could not be made: accuracies "
    "under attack are to be read with that in mind.",
}
_FLAT = (
    "Attacks on the cross-entropy fail here for a reason other than robustness, because its "
    "gradients vanish in float32: accuracies under them say nothing of this network. Attacks on "
    "margins, such as those of the checks below, have gradients."
)


def masking_sentence(found: MaskingReport, model: str) -> str:
    """The verdict on the model of this name, for the summary of a page."""
    place = f"{NORMS.get(found.norm, found.norm)}, radius {radius_text(found.eps, found.norm)}"
    first = f" {_sentence(found.reasons[0])}" if found.reasons else ""
    return (
        f"Gradient masking of {model} ({place}, {len(found.samples)} samples): {found.verdict}."
        f"{first}"
    )


def masking_sections(found: MaskingReport, model: str) -> list[Section]:
    """Verdict with reasons and checks, then the pictures that there are numbers for.

    Args:
        found: the report.
        model: name of the model that it is about.
    """
    return [
        _verdict_section(found, model),
        *_surface_sections(found, model),
        *_number_sections(found, model),
    ]


def _sentence(text: str) -> str:
    text = text.rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."


def _verdict_section(found: MaskingReport, model: str) -> Section:
    accuracy = (
        "there is no gradient to attack with"
        if found.gradient_accuracy is None
        else f"{percent(found.gradient_accuracy)} withstand the gradient attacks"
    )
    numbers = (
        f"Of {len(found.samples)} samples {model} has {percent(found.clean_accuracy)} right "
        f"without an attack; {accuracy}; {percent(found.accuracy)} withstand every attack of all "
        f"checks."
    )
    columns = ("check", "result", "proof alone", "expected of useful gradients", "found")
    rows = [
        (check.name, _WORDS[check.suspicious], "yes" if check.decisive else "no", check.expected,
         check.sentence)
        for check in found.checks
    ]  # fmt: skip
    place = f"{NORMS.get(found.norm, found.norm)}, radius {radius_text(found.eps, found.norm)}"
    return Section(
        f"Gradient masking of {model}: {found.verdict}",
        (_meaning(found), numbers, *map(_sentence, found.reasons)),
        table=table_of(columns, rows),
        caption=f"All checks at {place}. Where a share rests on few samples, an exact binomial "
        "test decides whether it is suspicious. Proof alone: suspicious, this check decides.",
    )


def _meaning(found: MaskingReport) -> str:
    """What the verdict means; a flat cross-entropy says nothing of attacks on the margin."""
    proofs = [check.name for check in found.checks if check.suspicious and check.decisive]
    if found.verdict == "masked" and proofs == ["gradient norms"] and found.flat_entropy:
        return _FLAT
    return _MEANING.get(found.verdict, "")


def _surface_sections(found: MaskingReport, model: str) -> list[Section]:
    surface = found.surface
    if surface is None or not len(surface.samples):
        return []
    rows = range(min(len(surface.samples), _SHOWN))
    up = "along the gradient's sign (eps)" if found.norm == "linf" else "along the gradient (eps)"
    across = "random signs (eps)" if found.norm == "linf" else "random direction (eps)"
    maps = [Surface(_name(surface, k), surface.offsets.numpy(), surface.losses[k].numpy())
            for k in rows]  # fmt: skip
    lines = [
        Ray(_name(surface, k), surface.ray.tolist(), surface.ray_losses[k].tolist(),
            surface.ray_predicted[k].tolist())
        for k in rows
    ]  # fmt: skip
    return [
        Section(
            f"The loss of {model} around samples",
            pictures=(
                surfaces(maps, ball=found.norm, x_label=up, y_label=across, value="loss (nats)"),
                rays(lines, title="Loss along the gradient", x_label=up, y_label="loss (nats)"),
            ),
            caption="The loss is the log-odds of a wrong class. Below 0 (purple) the label has "
            "more than half of the probability, so that the prediction is right; above (orange) "
            "less: of two classes it is wrong there, of more it may still be right. The black line "
            "is where the label has half, the circle the sample, the dashes the edge of the ball "
            "of the radius in this plane. A useful gradient leads smoothly up; a masked one meets "
            "flats, noise or cliffs. Inputs are kept within their bounds, where there are some.",
        )
    ]


def _name(surface: LossSurface, k: int) -> str:
    return f"sample {int(surface.samples[k])}"


def _number_sections(found: MaskingReport, model: str) -> list[Section]:
    """Sizes of gradients, and accuracy with the radius growing."""
    checks = {check.name: check for check in found.checks}
    made = (
        _norm_picture(checks.get("gradient norms")),
        _growth_picture(found, checks.get("growing eps")),
    )
    pictures = tuple(picture for picture in made if picture is not None)
    if not pictures:
        return []
    return [
        Section(
            f"Gradients and growing radii of {model}",
            pictures=pictures,
            caption="Gradients of zero or that are not finite give an attack no direction. With a "
            "growing radius the accuracy must fall, and at the last one samples of one class alone "
            "can be robust, since all balls share a point: what an attack leaves of the others is "
            "its own failure.",
        )
    ]


def _norm_picture(check: MaskingCheck | None) -> Picture | None:
    rows = []
    for loss, told in ({} if check is None else check.numbers).items():
        quantiles = tuple(told["quantiles"])
        useless = told["zero"] + told["not finite"]
        if any(map(drawable, quantiles)):
            label = f"{loss}: {told['zero']} zero" + (
                f", {told['not finite']} not finite" if useless > told["zero"] else ""
            )
            rows.append(Spread(label, quantiles))
    if not rows:
        return None
    return spreads(rows, title="Gradients in the input", axis="gradient norm (nats / input unit)")


def _growth_picture(found: MaskingReport, check: MaskingCheck | None) -> Picture | None:
    numbers = {} if check is None else check.numbers
    radii, shares = numbers.get("eps", ()), numbers.get("accuracy", ())
    if len(radii) < 2:
        return None
    scale = eps_scale(found.norm, [found.eps])  # those above it are in equal ratios
    nan = float("nan")
    values = [Estimate("", 100 * share, nan, nan) for share in shares]
    return labelled_lines(
        [Line("gradient attack", radii, values, "worst")],
        title="Accuracy with eps growing",
        x_label=radius_axis(found.norm, scale),
        y_label="right of those right at 0 (%)",
        scale=scale,
        rooted=True,
    )
