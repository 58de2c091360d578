"""Networks in wrappers: compiled, parallel, PEFT's, and all of them at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import flexure
from flexure import TrainableCT
from flexure.contracts import FlexureError
from flexure.methods.adapt import adapt
from flexure.methods.catalogue import METHODS
from flexure.surgery.wrapped import unwrapped
from tests.methods.adapted import Net, batch, method, net, put

X, Y = batch()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled DDP": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "DataParallel of compiled": lambda model: nn.DataParallel(compiled(model)),
}
EVERY = pytest.mark.parametrize("how", WRAPPERS)


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """One process by itself, which DDP needs."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


@pytest.fixture
def model() -> Net:
    return net()


@EVERY
def test_files_fit_the_network_with_and_without(how: str, model: Net, tmp_path: Path) -> None:
    wrapped = WRAPPERS[how](model)
    assert unwrapped(wrapped) is model
    plain = copy.deepcopy(model)
    adaptation = adapt(wrapped, TrainableCT(init_beta=0.6), example=X)
    assert adaptation.model is model
    assert adaptation.head == "head"
    assert "act.raw_beta" in adaptation.trainable
    adaptation.save(tmp_path)
    flexure.load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(X), model(X))
    other = WRAPPERS[how](net())
    assert flexure.load_adapter(other, tmp_path).trainable == adaptation.trainable
    torch.testing.assert_close(other(X), model(X))


@EVERY
def test_steering_and_sites(how: str, model: Net, tmp_path: Path) -> None:
    wrapped = WRAPPERS[how](model)
    before = wrapped(X)
    assert flexure.sites(wrapped, X).sites == flexure.sites(model, X).sites
    with flexure.steer(wrapped, beta=0.5, example=X) as steering:
        steering.save(tmp_path)
        steered = model(X)
        torch.testing.assert_close(wrapped(X), steered)
        assert not torch.allclose(before, steered, atol=1e-3)
    torch.testing.assert_close(wrapped(X), before)
    with flexure.load_adapter(net(), tmp_path) as loaded:
        torch.testing.assert_close(loaded.model(X), steered)


@pytest.mark.parametrize("name", METHODS)
def test_a_network_that_was_compiled_before(name: str, model: Net) -> None:
    wrapped = compiled(model)
    before = wrapped(X).detach()
    adaptation = put(wrapped, name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.2)
    model.eval()
    learned = model(X)
    assert not torch.allclose(learned, before, atol=1e-3)
    torch.testing.assert_close(wrapped(X), learned)
    F.cross_entropy(wrapped(X), Y).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with adaptation.disable():
        torch.testing.assert_close(wrapped(X), before)
    torch.testing.assert_close(wrapped(X), learned)
    adaptation.freeze()
    torch.testing.assert_close(wrapped(X), learned, rtol=1e-4, atol=1e-5)
    adaptation.remove()
    torch.testing.assert_close(wrapped(X), before)


def test_ddp_around_an_adapted_network_trains_it(model: Net) -> None:
    adaptation = adapt(model, TrainableCT(), example=X)
    wrapped = nn.parallel.DistributedDataParallel(model.train())
    optimizer = torch.optim.Adam(adaptation.parameter_groups())
    before = adaptation.betas()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(wrapped(X), Y).backward()
        optimizer.step()
    assert all(not torch.equal(before[site], now) for site, now in adaptation.betas().items())


def test_ddp_around_a_network_that_is_adapted_later_warns(
    model: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = nn.parallel.DistributedDataParallel(model)
    adaptation = adapt(wrapped, TrainableCT(), example=X)
    adaptation.save(tmp_path)
    adaptation.remove()
    monkeypatch.setattr(type(wrapped.process_group), "size", lambda self: 2)
    for around in (wrapped, compiled(wrapped)):
        with pytest.warns(UserWarning, match="make it anew") as caught:
            adaptation = adapt(around, TrainableCT(), example=X)
        assert caught[0].filename == __file__
        adaptation.remove()
        with pytest.warns(UserWarning, match="make it anew"):
            flexure.load_adapter(around, tmp_path).remove()


@pytest.mark.parametrize("how", ["compiled", "DataParallel"])
def test_search(how: str, model: Net) -> None:
    train, val = [(X, Y)], [(X + 0.1, Y)]
    found = [
        flexure.search_beta(around, train=train, val=val, betas=[0.8, 1.0], head="head")
        for around in (model, WRAPPERS[how](model))
    ]
    assert found[0].head == found[1].head == "head"
    assert found[0].settings == found[1].settings


def test_all_at_once(model: Net) -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv", "last"]))
    wrapped = compiled(nn.parallel.DistributedDataParallel(tuned.eval()))
    assert unwrapped(wrapped) is model
    adaptation = adapt(wrapped, method("steered_probe"), example=X)
    torch.testing.assert_close(wrapped(X), tuned(X))
    adaptation.remove()


@pytest.mark.parametrize("what", ["some:address", None, lambda x: x])
def test_what_is_no_network(what: object) -> None:
    for call in (
        lambda: adapt(what, TrainableCT(), example=X),
        lambda: flexure.steer(what, beta=0.8, example=X),
        lambda: flexure.sites(what, X),
    ):
        with pytest.raises(FlexureError, match=r"expected a network.*load_model"):
            call()
