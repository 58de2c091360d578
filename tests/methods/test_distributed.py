"""Two processes: a steered model under DistributedDataParallel gives the gradients of one."""

from __future__ import annotations

import subprocess
import sys

import torch

from flexure.methods.steer import steer
from tests.methods.test_steer import BETA, C, Routed

WORKER = """
import os, sys, torch
from flexure.methods.steer import steer
from tests.methods.test_steer import BETA, C, Routed

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
)
model = Routed()
given = torch.load(f"{folder}/given.pt")
model.load_state_dict(given["weights"])
x = given["x"]
with steer(model, beta=BETA, c=C, example=x, calibration=[x]):
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(x[rank::2]).square().mean().backward()
grads = {name: parameter.grad for name, parameter in model.named_parameters()}
torch.save(grads, f"{folder}/grads-{rank}.pt")
torch.distributed.barrier()
os._exit(0)  # gloo may abort where one process tears down before the other
"""


def test_two_processes_give_the_gradients_of_one(tmp_path) -> None:
    model, x = Routed(), torch.randn(8, 6)
    torch.save({"weights": model.state_dict(), "x": x}, tmp_path / "given.pt")
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(rank)])
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    with steer(model, beta=BETA, c=C, example=x, calibration=[x]):
        model(x).square().mean().backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"grads-{rank}.pt")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad)
