"""Two processes train with every penalty, and with SAM, to the weights of one."""

from __future__ import annotations

import pytest
import torch

from tests.penalties import scenarios
from tests.train.test_processes import run


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    program = ["-m", "tests.penalties.scenarios", str(folder)]
    workers = [run([*program, str(rank)]) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", scenarios.SETTINGS)
def test_two_processes_give_the_weights_of_one(found, name: str):
    alone = scenarios.trained(name)
    first, second = (each[name] for each in found)
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-9)
    for key, value in alone["weights"].items():
        assert torch.equal(first["weights"][key], second["weights"][key])
        # SAM's library computes its norm in float32.
        torch.testing.assert_close(first["weights"][key], value, atol=1e-9, rtol=1e-8)
    for penalty, values in alone["penalties"].items():
        assert first["penalties"][penalty] == pytest.approx(values, rel=1e-8)
