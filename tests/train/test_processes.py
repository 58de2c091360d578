"""Several processes: the weights of one, agreement among them, and refusals on every one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from flexure.contracts import DataError
from flexure.processes import Processes
from tests.train import scenarios

ROOT = Path(__file__).parents[2]


def run(command: list[str]) -> subprocess.Popen:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *command], env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    workers = [run(["-m", "tests.train.scenarios", str(folder), str(rank)]) for rank in range(2)]
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
    assert first["history"] == second["history"]
    for key, value in alone["weights"].items():
        assert torch.equal(first["weights"][key], second["weights"][key])
        torch.testing.assert_close(first["weights"][key], value, atol=1e-5, rtol=0)
    assert first["history"].losses == pytest.approx(alone["history"].losses, abs=1e-5)
    assert first["history"].val_accuracy == alone["history"].val_accuracy
    for penalty, values in alone["history"].penalties.items():
        assert first["history"].penalties[penalty] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too small", "DataError: expected at least one sample for each of the 2 processes"),
        ("without gradient", "got none for lonely on process 1;"),
        ("sharded twice", "DataError: expected the same batches on all 2 processes"),
        ("not finite", "expected a finite loss, got nan at step 0"),
    ],
)
def test_every_process_refuses(found, name: str, message: str):
    assert all(message in each[name] for each in found), [each[name] for each in found]


@pytest.mark.parametrize(
    ("name", "process", "message"),
    [
        ("penalty", 1, "ValueError: boom"),
        ("graph", 1, "got one without a graph"),
        ("labels", 1, "DataError: expected labels in val of the model's 3 classes"),
        ("progress", 0, "ValueError: a full disk"),
    ],
)
def test_an_error_of_one_process_ends_both(found, name: str, process: int, message: str):
    failed, other = (found[i]["one-sided"][name] for i in (process, 1 - process))
    assert message in failed
    assert "Error: expected all 2 processes to go on" in other
    assert f"(process {process}: " in other
    assert message in other
    assert "and more" not in other


def test_other_courses_of_two_processes_end_both(found):
    for each in found:
        said = each["one-sided"]
        assert "got 1 on process 0, 0 on process 1 in the same update" in said["fewer"]
        assert "expected all 2 processes to do the same" in said["exchange"]


def test_normalisation_agrees_at_the_end_and_is_warned_about_once(found):
    first, second = (each["norm"] for each in found)
    assert first["history"] == second["history"]
    assert all(torch.equal(first["weights"][k], v) for k, v in second["weights"].items())
    assert (len(first["said"]), len(second["said"])) == (1, 0)


def test_an_interrupted_training_of_two_ends_as_an_undisturbed_one(found):
    for each in found:
        there, here = each["interrupted"]["undisturbed"], each["interrupted"]["resumed"]
        assert all(torch.equal(here[key], value) for key, value in there.items())


def test_shares_are_contiguous_and_cover_everything():
    for count in (1, 2, 3, 5):
        for rows in (5, 6, 7, 23):
            slices = [Processes(i, count).share(rows) for i in range(count)]
            assert [i for s in slices for i in range(rows)[s]] == list(range(rows))
            sizes = [s.stop - s.start for s in slices]
            assert max(sizes) - min(sizes) <= 1
    with pytest.raises(DataError, match="got 2"):
        Processes(0, 3).share(2)


SCRIPT = """
import sys, torch
from flexure.processes import current_processes
from tests.train.scenarios import trained

torch.set_num_threads(1)
result = trained("penalties")
processes = current_processes()
torch.save((processes.count, result), f"{sys.argv[1]}/launched-{processes.index}.pt")
torch.distributed.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_launchers(tmp_path, launcher: list[str]):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    port = ["--main_process_port", "0"] if "accelerate" in launcher[1] else []
    worker = run([*launcher, *port, str(script), str(tmp_path)])
    try:
        assert worker.wait(timeout=120) == 0
    finally:
        worker.kill()
    alone = scenarios.trained("penalties")
    for rank in range(2):
        count, result = torch.load(tmp_path / f"launched-{rank}.pt", weights_only=False)
        assert count == 2
        for key, value in alone["weights"].items():
            torch.testing.assert_close(result["weights"][key], value, atol=1e-5, rtol=0)


def test_a_wrapped_network_is_refused(monkeypatch):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = scenarios.network()

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapped)
    message = scenarios.refused(
        lambda: scenarios.fit(Wrapped(), scenarios.loader(), epochs=1, seed=0)
    )
    assert "before wrapping" in message
