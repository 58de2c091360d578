"""State files: what survives bit by bit, what a kill or damage does, and every optimiser."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from flexure.contracts import FlexureError
from flexure.train import Checkpoint
from flexure.train.checkpoint import (
    load_optimizer_tree,
    load_state,
    optimizer_tree,
    rng_state,
    save_state,
    set_rng_state,
)
from flexure.train.state_file import STATE


def identical(a, b) -> bool:
    """Same types, same values, to the last bit."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and bits(a) == bits(b)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    return a == b


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


BASE = torch.arange(24.0).reshape(4, 6)
QUIET_NAN = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
VALUES = {
    "none": None,
    "bools": [True, False],
    "ints": (0, -1, 2**63 - 1, -(2**63), 2**64, -(3**400), 7**9000),
    "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, QUIET_NAN],
    "strings": ["", "ä\n\0", "\ud800", '{"tensor": "0"}'],
    "empty": [{}, [], ()],
    "keys": {"": 1, "tensor": 2, "dict": {"tuple": 3}},
    "nested": {"a": [(1, [2.5, {"b": torch.ones(2)}])], "b": ((),)},
    "aliases": [BASE, BASE, BASE[1:], BASE.T, BASE[:, ::2], BASE[0].expand(3, 6)],
    "shapes": [torch.tensor(3.5), torch.empty(0), torch.empty(2, 0, 3), torch.ones(1, 1)],
    "specials": torch.tensor([-0.0, math.inf, -math.inf, math.nan, 1e-45]),
    "parameter": nn.Parameter(torch.ones(3)).detach(),
    "conjugate": torch.view_as_complex(torch.randn(3, 2)).conj(),
    "negative": torch.view_as_complex(torch.randn(3, 2)).conj().imag,
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    **{
        str(dtype): torch.tensor([0, 1, 1, 0]).to(dtype)
        for dtype in (
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.uint16,
            torch.uint32,
            torch.uint64,
            torch.bool,
            torch.complex64,
        )
    },
}


@pytest.mark.parametrize("name", VALUES)
def test_values_survive_bit_by_bit(tmp_path, name):
    save_state(tmp_path, VALUES[name])
    assert identical(load_state(tmp_path), VALUES[name])


def test_all_at_once_and_again(tmp_path):
    save_state(tmp_path / "new" / "folder", VALUES)
    for _ in range(2):
        assert identical(load_state(tmp_path / "new" / "folder"), VALUES)
        save_state(tmp_path / "new" / "folder", load_state(tmp_path / "new" / "folder"))


def test_what_is_loaded_has_memory_of_its_own(tmp_path):
    save_state(tmp_path, [BASE, BASE])
    first, second = load_state(tmp_path)
    first.add_(1)
    assert torch.equal(second, BASE)
    assert torch.equal(load_state(tmp_path)[0], BASE)
    assert first.data_ptr() % 64 == 0  # as torch's own memory, on which the order of sums depends


def test_a_state_dict_survives(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].weight = model[0].bias  # shared
    model(torch.randn(2, 3, 8, 8))
    save_state(tmp_path, {"model": model.state_dict()})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.zero_()
    twin.load_state_dict(load_state(tmp_path)["model"])
    assert identical(dict(twin.state_dict()), dict(model.state_dict()))


def test_no_state_is_none(tmp_path):
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "missing") is None


class Odd:
    pass


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [1, Odd()]}, r"Odd at state\['a'\]\[1\]"),
        ({"a": {1: 2}}, r"dict at state\['a'\]"),
        ({"a": {1, 2}}, r"set at state\['a'\]"),
        ((1, np.ones(2)), r"ndarray at state\[1\]"),
        ([torch.ones(2).to_sparse()], r"sparse tensor at state\[0\]"),
        ([torch.ones(2, device="meta")], r"meta tensor at state\[0\]"),
        ([torch.ones(2, dtype=torch.complex128)], r"complex128 tensor at state\[0\]"),
        (os.stat_result(range(10)), "stat_result at state"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_lost(tmp_path, tree, message):
    save_state(tmp_path, "old")
    with pytest.raises(FlexureError, match=message):
        save_state(tmp_path, tree)
    assert load_state(tmp_path) == "old"
    assert os.listdir(tmp_path) == [STATE]


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path):
    tree = {"a": torch.arange(5.0), "b": (1, 2.5, "text"), "c": torch.tensor([True])}
    save_state(tmp_path, tree)
    whole = (tmp_path / STATE).read_bytes()
    harmless = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x11
        (tmp_path / STATE).write_bytes(damaged)
        try:
            # A space between values of the header, or another byte for the same bool.
            assert identical(load_state(tmp_path), tree)
            harmless += 1
        except FlexureError as error:
            named = str(tmp_path / STATE) in str(error)
            assert named, error  # noqa: PT017
    assert harmless < 10
    for length in range(0, len(whole), 7):
        (tmp_path / STATE).write_bytes(whole[:length])
        with pytest.raises(FlexureError, match="damaged"):
            load_state(tmp_path)


def test_a_foreign_file_and_a_folder_in_its_place(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / STATE)
    with pytest.raises(FlexureError, match="not a state"):
        load_state(tmp_path)
    (tmp_path / STATE).unlink()
    (tmp_path / STATE).mkdir()
    with pytest.raises(FlexureError, match="damaged"):
        load_state(tmp_path)
    with pytest.raises(FlexureError, match="could not save"):
        save_state(tmp_path, 1)


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FlexureError, match="could not save"):
        save_state(tmp_path / "file", 1)
    assert load_state(tmp_path / "file") is None


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_state(tmp_path, monkeypatch, failing):
    save_state(tmp_path, "old")

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(FlexureError, match="no space left"):
            save_state(tmp_path, "new")
    assert load_state(tmp_path) == "old"
    assert os.listdir(tmp_path) == [STATE]


def test_file_and_folder_are_synced_around_the_renaming(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        true = getattr(os, name)

        def noted(*arguments, name=name, true=true):
            calls.append(name)
            return true(*arguments)

        monkeypatch.setattr(os, name, noted)
    save_state(tmp_path, torch.ones(3))
    assert calls == ["fsync", "replace", "fsync"]


WRITER = """
import sys, torch
from flexure.train.checkpoint import save_state
print("ready", flush=True)
for i in range(10**9):
    save_state(sys.argv[1], {"i": i, "a": torch.full((200_000,), float(i)), "b": torch.tensor(i)})
"""


def test_a_reader_finds_a_whole_state_whenever_the_writer_is_killed(tmp_path):
    moments, seen, left = random.Random(0), set(), False
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE
        )
        child.stdout.readline()
        until = time.monotonic() + 0.1 + moments.random() * 0.2
        while time.monotonic() < until or not seen:
            state = load_state(tmp_path)
            if state is not None:
                assert (state["a"] == state["i"]).all()
                assert state["b"] == state["i"]
                seen.add(state["i"])
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        state = load_state(tmp_path)
        assert (state["a"] == state["i"]).all()
        left |= len(os.listdir(tmp_path)) > 1
    assert len(seen) > 3
    (tmp_path / f".{STATE}.1-1.tmp").write_bytes(b"half")
    save_state(tmp_path, "last")
    assert os.listdir(tmp_path) == [STATE]


def test_generators_go_on_where_they_were(tmp_path):
    def draws():
        return [
            torch.rand(3).tolist(),
            random.random(),
            random.gauss(0, 1),
            np.random.rand(3).tolist(),
            np.random.randn(3).tolist(),
        ]

    before = rng_state()
    try:
        random.gauss(0, 1)  # half of a pair: the other half belongs to the state
        np.random.randn()
        save_state(tmp_path, rng_state())
        expected = draws()
        draws()
        set_rng_state(load_state(tmp_path))
        assert draws() == expected
    finally:
        set_rng_state(before)


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_numpys_other_bit_generators(tmp_path, kind):
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(kind(3))
    try:
        save_state(tmp_path, rng_state())
        expected = np.random.rand(3).tolist()
        set_rng_state(load_state(tmp_path))
        assert np.random.rand(3).tolist() == expected
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("tree", [{}, {**rng_state(), "torch": torch.ones(3)}])
def test_something_else_than_generators(tree):
    np.random.rand(), random.random()  # the tree's own states are not those of now
    before = rng_state()
    with pytest.raises(FlexureError, match="random generators"):
        set_rng_state(tree)
    assert identical(rng_state(), before)


# The settings that each optimiser is tried with.
OPTIMISERS = {
    "ASGD": [{"lr": 0.1, "t0": 1.0}, {"lambd": 0.1}],
    "Adadelta": [{"lr": 0.5}],
    "Adafactor": [{"eps": (None, 1e-3)}, {"eps": (1e-6, 1e-3)}],
    "Adagrad": [{"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}, {"fused": True}],
    "Adam": [{"amsgrad": True}, {"fused": True}, {"lr": torch.tensor(0.1), "foreach": False}],
    "AdamW": [{}, {"fused": True}, {"amsgrad": True, "foreach": True}],
    "Adamax": [{}],
    "LBFGS": [{"max_iter": 3, "history_size": 2}, {"line_search_fn": "strong_wolfe"}],
    "Muon": [{}, {"nesterov": False}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{}, {"lr": 0.1}],
    "RMSprop": [{"momentum": 0.5, "centered": True}],
    "Rprop": [{}],
    "SGD": [{"momentum": 0.9, "nesterov": True}, {}, {"fused": True, "momentum": 0.5}],
    "SparseAdam": [{}],
}
CASES = [(name, settings) for name, choices in OPTIMISERS.items() for settings in choices]


class Problem:
    """A least-squares problem in two groups of parameters, and the optimiser that is tried."""

    def __init__(self, name: str, settings: dict, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        sparse = name == "SparseAdam"
        shapes = [(4, 3), (3, 2)] if name == "Muon" or sparse else [(4, 3), (3,)]
        self.parameters = [
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for shape in shapes
        ]
        self.sparse = sparse
        groups = [{"params": self.parameters[:1]}, {"params": self.parameters[1:], "lr": 0.03}]
        if name == "LBFGS":
            groups = self.parameters
        self.optimizer = getattr(torch.optim, name)(groups, **copy.deepcopy(settings))

    def step(self, index: int) -> None:
        def closure():
            self.optimizer.zero_grad()
            rows = torch.tensor([index % 2, 2])
            loss = sum(
                (nn.functional.embedding(rows, p, sparse=True) if self.sparse else p)
                .sub(index)
                .square()
                .sum()
                for p in self.parameters
            )
            loss.backward()
            return loss

        self.optimizer.step(closure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_after_loading_the_steps_are_the_same(tmp_path, name, settings, dtype):
    undisturbed = Problem(name, settings, dtype)
    for index in range(3):
        undisturbed.step(index)
    undisturbed.optimizer.param_groups[0]["lr"] = 0.02
    tree = optimizer_tree(undisturbed.optimizer)
    save_state(tmp_path, {"optimizer": tree, "weights": undisturbed.parameters})
    resumed = Problem(name, settings, dtype)
    stored = load_state(tmp_path)
    load_optimizer_tree(resumed.optimizer, stored["optimizer"])
    assert identical(optimizer_tree(resumed.optimizer), tree)
    with torch.no_grad():
        for parameter, value in zip(resumed.parameters, stored["weights"], strict=True):
            parameter.copy_(value)
    for index in range(3, 6):
        undisturbed.step(index)
        resumed.step(index)
        assert identical(resumed.parameters, undisturbed.parameters)
    assert identical(optimizer_tree(resumed.optimizer), optimizer_tree(undisturbed.optimizer))


def test_the_table_has_every_optimiser_of_torch():
    found = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }
    assert found == set(OPTIMISERS)


def test_scalars_beside_float64_weights_stay_float32():
    # What torch's own load_state_dict changes: this is why ours does more.
    problem, other = (Problem("NAdam", {}, torch.float64) for _ in range(2))
    problem.step(0)
    load_optimizer_tree(other.optimizer, optimizer_tree(problem.optimizer))
    assert other.optimizer.state[other.parameters[0]]["mu_product"].dtype == torch.float32


def test_what_lies_beside_a_parameter_on_another_device_stays_there():
    # As Adam's step count and NAdam's products do, on the CPU while the weights are elsewhere.
    tree = optimizer_tree(Problem("Adam", {}, torch.float32).optimizer)
    tree["groups"] = [{**tree["groups"][0], "params": [[3]]}]
    values = {"step": torch.tensor(2.0), "exp_avg": torch.ones(3), "more": [torch.ones(1)]}
    tree["state"] = [{"of": 0, "values": values, "apart": ["step", "more"]}]
    parameter = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.Adam([parameter])
    load_optimizer_tree(optimizer, tree)
    state = optimizer.state[parameter]
    assert state["exp_avg"].is_meta
    assert (state["step"].device.type, state["more"][0].device.type) == ("cpu", "cpu")
    state.pop("exp_avg")
    assert optimizer_tree(optimizer)["state"][0]["apart"] == ["step", "more"]


def test_loading_copies():
    problem, other = (Problem("Adam", {}, torch.float32) for _ in range(2))
    problem.step(0)
    tree = optimizer_tree(problem.optimizer)
    kept, groups = copy.deepcopy(tree), list(other.optimizer.param_groups)
    load_optimizer_tree(other.optimizer, tree)
    other.step(1)
    assert identical(tree, kept)
    # Who set rates in these dictionaries before goes on doing so.
    assert all(a is b for a, b in zip(groups, other.optimizer.param_groups, strict=True))


def test_an_optimiser_before_its_first_step():
    problem, other = (Problem("Adam", {}, torch.float32) for _ in range(2))
    other.step(0)
    load_optimizer_tree(other.optimizer, optimizer_tree(problem.optimizer))
    assert not other.optimizer.state


def test_named_parameters():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.named_parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tree = optimizer_tree(optimizer)
    load_optimizer_tree(torch.optim.Adam(layer.named_parameters()), tree)
    assert tree["groups"][0]["param_names"] == ["weight", "bias"]


class KeepsElsewhere(torch.optim.SGD):
    def state_dict(self):
        return {**super().state_dict(), "slow": {}}


class KeepsAFunction(torch.optim.SGD):
    def step(self, closure=None):
        self.state[self.param_groups[0]["params"][0]]["memory"] = print


@pytest.mark.parametrize(
    ("kind", "message"), [(KeepsElsewhere, "slow"), (KeepsAFunction, r"\['memory'\]")]
)
def test_what_an_optimiser_keeps_elsewhere_is_an_error(kind, message):
    optimizer = kind([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.step()
    with pytest.raises(FlexureError, match=message):
        optimizer_tree(optimizer)


def test_another_optimiser_is_an_error_and_unchanged():
    problem = Problem("Adam", {}, torch.float32)
    problem.step(0)
    tree = optimizer_tree(problem.optimizer)
    others = [
        Problem("SGD", {"momentum": 0.9}, torch.float32).optimizer,
        torch.optim.Adam([nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]),
        torch.optim.Adam(
            [
                {"params": [nn.Parameter(torch.ones(4, 3))]},
                {"params": [nn.Parameter(torch.ones(4))]},
            ]
        ),
    ]
    for other in others:
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(FlexureError, match="expected the state of"):
            load_optimizer_tree(other, tree)
        assert identical(other.state_dict()["param_groups"], before["param_groups"])
        assert not other.state
    for broken in ({}, {**tree, "state": [{}]}, {**tree, "state": None}):
        with pytest.raises(FlexureError, match="optimizer_tree"):
            load_optimizer_tree(problem.optimizer, broken)


def test_a_wrapped_optimiser_of_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    problem, other = (Problem("Adam", {}, torch.float32) for _ in range(2))
    problem.step(0)
    wrapped = accelerator.prepare_optimizer(problem.optimizer)
    tree = optimizer_tree(wrapped)
    load_optimizer_tree(accelerator.prepare_optimizer(other.optimizer), tree)
    assert identical(optimizer_tree(other.optimizer)["state"], tree["state"])


def test_where_and_how_often():
    assert Checkpoint("runs/one") == Checkpoint(path="runs/one", every=None)
    for bad in ({"path": ""}, {"path": 3}, {"path": "a", "every": 0}, {"path": "a", "every": 2.0}):
        with pytest.raises(FlexureError, match="expected"):
            Checkpoint(**bad)
    with pytest.raises(FlexureError, match="every"):
        Checkpoint("a", every=True)
