"""Adversarial examples: what is drawn is what is said, and inputs that are no images are tables."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexure.contracts import FlexureError
from flexure.report.attack_examples import class_name, example_sections
from flexure.report.attack_images import (
    Example,
    affordable,
    drawable_as_image,
    example_picture,
    nice_factor,
)
from tests.report.attack_results import examples, images_of


@given(st.floats(1e-12, 1e6), st.floats(1e-3, 1e3))
def test_the_factor_is_the_largest_round_one_that_clips_nothing(size: float, span: float) -> None:
    factor = nice_factor(size, span)
    assert factor * size <= span / 2 * (1 + 1e-5)
    assert 2.5 * factor * size > span / 2 * (1 - 1e-5)
    assert f"{factor:.0e}"[0] in "125"


@pytest.mark.parametrize("size", [0.0, float("nan"), float("inf")])
def test_no_change_is_not_enlarged(size: float) -> None:
    assert nice_factor(size, 1.0) == 1.0


def test_the_images_are_the_inputs_and_the_change_around_mid_grey() -> None:
    x = np.full((3, 4, 5), 0.5)
    x_adv = x.copy()
    x_adv[0, 1, 2] += 0.004
    x_adv[2, 3, 4] -= 0.002
    picture = example_picture(Example(x, x_adv, "cat", "dog", "l∞ norm 0.004", "sample 3", (0, 1)))
    original, adversarial, change = (image for image in images_of(picture.svg))
    assert original.shape == (4, 5, 3)
    assert original == pytest.approx(0.5, abs=1 / 255)
    assert adversarial[1, 2, 0] == pytest.approx(0.504, abs=1 / 255)
    assert change[1, 2, 0] == pytest.approx(0.5 + 100 * 0.004, abs=1 / 255)
    assert change[3, 4, 2] == pytest.approx(0.5 - 100 * 0.002, abs=1 / 255)
    assert change[0, 0] == pytest.approx(0.5, abs=1 / 255)
    assert "times 100 (l∞ norm 0.004)" in picture.alt
    assert "class cat" in picture.alt
    assert "predicted as dog" in picture.alt


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 255.0)])
def test_other_bounds_are_scaled_to_colours(bounds: tuple[float, float]) -> None:
    low, high = bounds
    x = np.linspace(low, high, 16).reshape(1, 4, 4)
    picture = example_picture(Example(x, x, "a", "b", "", "", bounds))
    original, _, change = images_of(picture.svg)
    assert original[0, 0] == pytest.approx(0, abs=1 / 255)
    assert original[3, 3] == pytest.approx(1, abs=1 / 255)
    assert change == pytest.approx(0.5, abs=1 / 255)


def test_long_and_odd_names_are_drawn() -> None:
    x = np.zeros((1, 8, 8))
    name = "$great_white <shark>$ " * 20
    picture = example_picture(Example(x, x, name, "_", name, name, (0, 1)))
    ElementTree.fromstring(picture.svg)


@pytest.mark.parametrize("shape", [(8,), (2, 8, 8), (3, 1, 1), (3, 4, 100), (1, 2, 3, 4)])
def test_what_is_no_image_is_refused_and_told_as_a_table(shape: tuple[int, ...]) -> None:
    assert not drawable_as_image(shape)
    x = np.zeros(shape)
    with pytest.raises(FlexureError, match="1 or 3 channels"):
        example_picture(Example(x, x, "a", "b", "", "", (0, 1)))
    (section,) = example_sections(examples(3, shape), ["cat", "dog", "frog"])
    assert not section.pictures
    assert section.table is not None
    assert section.table.rows[1][:4] == ("7", "dog", "frog", "l∞ norm 2/255")


def test_large_images_are_few_and_this_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert affordable((3, 32, 32)) >= 8
    assert 1 <= affordable((3, 224, 224)) <= 5
    assert affordable((3, 5000, 5000)) == 1
    drawn: list[Example] = []
    monkeypatch.setattr("flexure.report.attack_examples.example_picture", drawn.append)
    (section,) = example_sections(examples(14, (1, 4, 4), norms=("linf", "l2")))
    assert len(section.pictures) == len(drawn) == affordable((1, 4, 4))
    assert "12 of 14 are drawn" in section.caption
    assert {example.size.split()[0] for example in drawn} == {"l∞", "l2"}


def test_sizes_are_those_of_the_change() -> None:
    found = examples(2, (3, 8, 8), norms=("linf", "l2"))
    linf, l2 = example_sections(found)[0].pictures
    assert "l∞ norm 2/255" in linf.alt
    length = float((found.x_adv[1] - found.x[1]).double().norm())
    assert f"l2 norm {length:.3g}" in l2.alt


def test_nothing_found_has_no_section() -> None:
    assert example_sections(examples(0)) == []


def test_inputs_without_bounds_are_drawn() -> None:
    (section,) = example_sections(examples(1, bounds=None))
    assert len(images_of(section.pictures[0].svg)) == 3
    flat = examples(1, bounds=None)
    same = torch.full_like(flat.x, 7.0)
    assert example_sections(replace(flat, x=same, x_adv=same))


def test_classes_without_a_name_have_their_number() -> None:
    assert class_name(["cat"], 0) == "cat"
    assert class_name(["cat"], 1) == "1"
    assert class_name(None, 7) == "7"
    assert class_name([], 0) == "0"
    assert class_name(["cat"], -1) == "none (logits are not finite)"
