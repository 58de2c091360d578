"""Calling what is other people's: the seed is the CPU's alone, and is put back."""

from __future__ import annotations

import pytest
import torch

from flexure.calling import seeded
from flexure.recipes import spiral


def test_seeded_draws_what_the_seed_says_and_puts_the_generator_back() -> None:
    before = torch.get_rng_state()
    with seeded(3):
        drawn = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))


def test_no_accelerator_is_reseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU was reseeded")
    )
    spiral._network((2, 3, 2), seed=1)
