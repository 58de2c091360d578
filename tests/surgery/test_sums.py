"""Residual sums: which are found, what is refused, and what scaling them changes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flexure
from flexure.contracts import FlexureError, SiteError
from flexure.layers.residual import ResidualSum
from flexure.models.resnet import CifarResNet
from flexure.surgery.sums import SumReport, find_sums, scale_sums
from tests.methods.test_steer import state
from tests.networks import BasicBlock, ResNet, Swin, resnet18, resnet50


class Block(nn.Module):
    """A residual block that adds by any function of (module, branch, shortcut)."""

    def __init__(self, add: Callable[[Any, Tensor, Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        self.linear, self.add = nn.Linear(width, width), add
        self.bias = nn.Parameter(torch.randn(width))
        self.register_buffer("position", torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self, self.linear(x), x)


class PreActivation(nn.Module):
    """He et al. 2016: normalise, rectify, convolve, and add to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.relu(norm(x)))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """DenseNet's join: no sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.cat([x, F.relu(self.one(x))], 1))


class Shortcut(nn.Sequential):
    """A subclass of nn.Sequential that adds what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Positions(nn.Module):
    """Adds constants of every kind, and one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.where = nn.Embedding(10, 4), nn.Embedding(8, 4)
        self.shift = nn.Parameter(torch.randn(4))
        self.linear = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.where(torch.arange(tokens.shape[1]))
        x = x + self.shift + 1.0
        x = x + torch.zeros_like(x) + x.new_ones(4)
        x += torch.ones(4)
        mask = torch.full(x.shape[1:], 0.5)
        return self.linear(x + mask).mean(1) + x.mean(1)


def plain(kind: Callable[..., Any]) -> tuple[nn.Module, Tensor]:
    return kind(), torch.randn(3, 4)


ADDS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "operator": (lambda m, a, b: a + b, "a + b"),
    "in place": (lambda m, a, b: a.__iadd__(b), "a += b"),
    "torch.add": (lambda m, a, b: torch.add(a, b), "a + b"),
    "by name": (lambda m, a, b: torch.add(input=a, other=b), "a + b"),
    "method": (lambda m, a, b: a.add(b), "a + b"),
    "method by name": (lambda m, a, b: a.add(other=b), "a + b"),
    "method in place": (lambda m, a, b: a.add_(b), "a += b"),
    "raw": (lambda m, a, b: torch.ops.aten.add.Tensor(a, b), "a + b"),
    "alpha of 1": (lambda m, a, b: torch.add(a, b, alpha=1), "a + b"),
    "of itself": (lambda m, a, b: a + a, "a + b"),
    "python's sum": (lambda m, a, b: sum([a, b]), "a + b"),
    "through views": (lambda m, a, b: a + b.view(-1, 2, 2).flatten(1), "a + b"),
    "buffer that is written": (lambda m, a, b: a + torch.zeros_like(b).copy_(b), "a + b"),
    "buffer written through a view": (lambda m, a, b: a + _filled(b), "a + b"),
    "after constants": (lambda m, a, b: (a + m.bias) + b, "a + b"),
    "before constants": (lambda m, a, b: (a + b) + m.position, "a + b"),
}


def _filled(b: Tensor) -> Tensor:
    out = torch.zeros(b.shape)
    out[:, :2] = b[:, :2]
    out[:, 2:].copy_(b[:, 2:])
    return out


@pytest.mark.parametrize("name", ADDS)
def test_every_spelling_is_found_and_scaled(name: str) -> None:
    add, kind = ADDS[name]
    block, x = Block(add), torch.randn(3, 4)
    report = find_sums(nn.Sequential(block), x)
    (found,) = report.sums
    assert (found.name, found.caller, found.index, found.run) == ("0:0", "0", 0, 0)
    assert (found.shape, found.kind) == ((3, 4), kind)
    model = nn.Sequential(block)
    branch = block.linear(x)
    other = branch if name == "of itself" else x
    first = branch + block.bias if name == "after constants" else branch
    total = 0.25 * (first + other)
    expected = total + block.position if name == "before constants" else total
    before = model(x)
    with scale_sums(model, report, 0.25):
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x), before)


REFUSED: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "minus": (lambda m, a, b: a - b, "sub", "a + (-b)"),
    "alpha": (lambda m, a, b: torch.add(a, b, alpha=0.5), "a + b", "alpha=0.5"),
    "out": (lambda m, a, b: torch.add(a, b, out=torch.empty(a.shape)), "a + b", "out="),
    "lerp": (lambda m, a, b: torch.lerp(a, b, 0.5), "lerp", "weights of its own"),
    "addcmul": (lambda m, a, b: torch.addcmul(a, b, m.bias), "addcmul", "weights of its own"),
    "addcdiv": (lambda m, a, b: torch.addcdiv(a, b, m.bias), "addcdiv", "weights of its own"),
    "sum of a stack": (lambda m, a, b: torch.stack([a, b]).sum(0), "sum", "stacked"),
    "mean of a stack": (lambda m, a, b: torch.mean(torch.stack([a, b]), 0), "mean", "stacked"),
    "product": (lambda m, a, b: a * b, "mul", "product"),
    "matrix product": (lambda m, a, b: a @ b.mT @ a, "matmul", "product"),
    "einsum": (lambda m, a, b: torch.einsum("bi,bi->bi", a, b), "einsum", "product"),
    "quotient": (lambda m, a, b: a / b, "div", "product"),
    "maximum": (lambda m, a, b: torch.maximum(a, b), "maximum", "several values"),
    "distance": (lambda m, a, b: torch.cdist(a, b)[:, :1] * 1.0, "cdist", "several values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_is_listed_with_its_reason(name: str) -> None:
    combine, function, reason = REFUSED[name]
    report = find_sums(nn.Sequential(Block(combine)), torch.randn(3, 4))
    assert report.sums == ()
    assert report.routes == {}
    assert all(each.caller == "0" for each in report.refused)
    assert any(function in each.name and reason in each.reason for each in report.refused)
    assert "left: " in str(report)


def _written(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(2, *a.shape)
    out[0], out[1] = a, b
    return out


def _copied(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(2, *a.shape)
    out[0].copy_(a)
    out[1].copy_(b)
    return out


MIXING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "view of a concatenation": lambda a, b: torch.cat([a, b], 1).view(-1, 2, 4).sum(1),
    "unflattened": lambda a, b: torch.cat([a, b], 1).unflatten(1, (2, 4)).mean(1),
    "unfolded": lambda a, b: torch.cat([a, b], 1).unfold(1, 4, 4).sum(1),
    "concatenated samples": lambda a, b: F.relu(torch.cat([a, b])).view(2, -1, 4).sum(0),
    "new axes": lambda a, b: torch.cat([a[None], b[None]]).float().mean(0),
    "scaled stack": lambda a, b: (torch.stack([a, b]) * 0.5).sum(0),
    "contiguous": lambda a, b: torch.stack([a, b], 1).contiguous().sum(1),
    "permuted": lambda a, b: torch.stack([a, b], 2).permute(2, 0, 1).clone().sum(0),
    "through a layer": lambda a, b: F.linear(torch.stack([a, b]), torch.eye(4)).sum(0),
    "nested": lambda a, b: torch.cat([torch.cat([a, b], 1), a], 1).view(-1, 3, 4)[:, :2].sum(1),
    "cumsum": lambda a, b: torch.stack([a, b]).cumsum(0)[-1],
    "einsum": lambda a, b: torch.einsum("sbd->bd", torch.stack([a, b])),
    "weighted einsum": lambda a, b: torch.einsum("sbd,s->bd", torch.stack([a, b]), torch.ones(2)),
    "matmul": lambda a, b: (torch.ones(1, 2) @ torch.stack([a, b], 1)).squeeze(1),
    "linear": lambda a, b: F.linear(torch.stack([a, b], -1), torch.ones(1, 2)).squeeze(-1),
    "tensordot": lambda a, b: torch.tensordot(torch.ones(2), torch.stack([a, b]), dims=1),
    "avg_pool": lambda a, b: F.avg_pool1d(torch.stack([a, b], -1), 2).squeeze(-1),
    "conv": lambda a, b: F.conv1d(torch.stack([a, b], 1), torch.ones(1, 2, 1)).squeeze(1),
    "setitem": lambda a, b: _written(a, b).sum(0),
    "copy_": lambda a, b: _copied(a, b).mean(0),
    "setitem into a signal": lambda a, b: (
        lambda o: (o.__setitem__((slice(None), 0), b[:, 0]), o)[1]
    )(a.clone()).cumsum(1),
}


@pytest.mark.parametrize("name", MIXING)
def test_sums_over_joined_values_are_refused(name: str) -> None:
    mix = MIXING[name]
    report = find_sums(nn.Sequential(Block(lambda m, a, b: mix(a, b))), torch.randn(3, 4))
    assert report.sums == ()
    (refused,) = report.refused
    assert "stacked or joined" in refused.reason
    assert refused.caller == "0"


APART: dict[str, Callable[[Block, Tensor, Tensor], Tensor]] = {
    "layer after a concatenation": lambda m, a, b: F.linear(torch.cat([a, b], 1), torch.ones(2, 8)),
    "concatenated channels": lambda m, a, b: F.conv1d(
        F.batch_norm(torch.cat([a[:, None], b[:, None]], 1), torch.zeros(2), torch.ones(2)),
        torch.ones(3, 2, 1),
    ).mean(2),
    "pooled over space": lambda m, a, b: F.avg_pool1d(
        torch.cat([a[:, None], b[:, None]], 1), 4
    ).flatten(1),
    "shuffled channels": lambda m, a, b: (
        torch.cat([a, b], 1).view(-1, 2, 4).transpose(1, 2).flatten(1) @ torch.ones(8, 4)
    ),
    "mean over space": lambda m, a, b: torch.stack([a, b], 1).mean(2),
    "one of a stack": lambda m, a, b: torch.stack([a, b])[1].sum(1, keepdim=True),
    "unbound": lambda m, a, b: torch.stack([a, b]).unbind()[0].cumsum(1),
    "chunked": lambda m, a, b: torch.cat([a, b], 1).chunk(2, 1)[0].sum(1, keepdim=True),
    "split": lambda m, a, b: m.linear(torch.cat([a, b], 1).split(4, 1)[1]).mean(1, keepdim=True),
    "with a constant": lambda m, a, b: torch.cat([a, m.bias.expand(3, 4)], 1).sum(1, keepdim=True),
    "padded": lambda m, a, b: (lambda o: (o.__setitem__((slice(None), slice(4)), a), o)[1])(
        torch.zeros(3, 6)
    ).sum(1, keepdim=True),
    "layer of a stack": lambda m, a, b: m.linear(torch.stack([a, b]))[0],
}


@pytest.mark.parametrize("name", APART)
def test_joined_values_that_stay_apart_are_no_sums(name: str) -> None:
    report = find_sums(nn.Sequential(Block(APART[name])), torch.randn(3, 4))
    assert (report.sums, report.refused) == ((), ())


def test_parts_of_joined_values_may_be_added() -> None:
    def add(m: Block, a: Tensor, b: Tensor) -> Tensor:
        both = torch.stack([a, b])
        return both[0] + both[1]

    model, x = nn.Sequential(Block(add)), torch.randn(3, 4)
    report = find_sums(model, x)
    assert (len(report.sums), report.refused) == (1, ())
    before = model(x)
    with scale_sums(model, report, 0.5):
        torch.testing.assert_close(model(x), before / 2)


@pytest.mark.parametrize(
    ("name", "leave"),
    [
        ("numpy", lambda a: torch.from_numpy(a.detach().numpy().copy())),
        ("tolist", lambda a: torch.tensor(a.tolist())),
        ("item", lambda a: torch.full_like(a, a.mean().item())),
        ("__float__", lambda a: torch.full(a.shape, float(a.mean()))),
    ],
)
def test_values_that_leave_pytorch_are_listed(name: str, leave) -> None:
    model = nn.Sequential(Block(lambda m, a, b: leave(a) + b))
    report = find_sums(model, torch.randn(3, 4))
    assert any(name in each.name and "out of PyTorch" in each.reason for each in report.refused)


def test_complex_sums_are_listed() -> None:
    def add(m: Block, a: Tensor, b: Tensor) -> Tensor:
        total = torch.view_as_complex(a.view(-1, 2, 2)) + torch.view_as_complex(b.view(-1, 2, 2))
        return torch.view_as_real(total).flatten(1)

    report = find_sums(nn.Sequential(Block(add)), torch.randn(3, 4))
    assert report.sums == ()
    assert any("complex" in each.reason for each in report.refused)


@pytest.mark.parametrize("before", [True, False])
def test_additions_of_hooks_are_refused_and_do_not_disturb(before: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Block(lambda m, a, b: a + b)), torch.randn(3, 4)
    if before:
        model[1].register_forward_pre_hook(lambda module, args: (args[0] + args[0].flip(0),))
        model[1].register_forward_pre_hook(
            lambda module, args: (torch.ones(2) + module.bias[:2], None)[1]
        )
    else:
        model[1].register_forward_hook(lambda module, args, output: output + args[0])
        model[1].register_forward_hook(lambda *_: (torch.ones(2) + torch.ones(2), None)[1])
    report = find_sums(model, x)
    assert [found.name for found in report.sums] == ["1:0"]
    (refused,) = report.refused
    assert "in a hook" in refused.reason
    plain = model(x)
    h = model[0](x)
    h = h + h.flip(0) if before else h
    expected = (model[1].linear(h) + h) / 2 + (0 if before else h)
    with scale_sums(model, report, 0.5):
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x), plain)


def test_additions_of_training_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self, inner: bool) -> None:
            super().__init__()
            self.linear, self.noise = nn.Linear(4, 4), Noise()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.linear(x)
            if self.inner:
                return self.noise(y)
            return y + 0 * torch.randn_like(y) if self.training else y

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * torch.randn_like(x) if self.training else x

    x = torch.randn(3, 4)
    for inner in (True, False):
        model = Noisy(inner)
        with scale_sums(model, find_sums(model, x), 0.5):
            if inner:
                torch.testing.assert_close(model.train()(x), (x + model.linear(x)) / 2)
            else:
                with pytest.raises(SiteError, match=r"train mode alone .* submodule of its own"):
                    model.train()(x)


def test_a_scaled_model_says_so() -> None:
    model, x, report = built("cifar")
    assert not report.scaled
    with scale_sums(model, report, 0.5):
        assert find_sums(copy.deepcopy(model), x).summary.endswith("sums are scaled already")
    assert not find_sums(model, x).scaled


def test_constants_are_no_signals() -> None:
    model, tokens = Positions(), torch.randint(0, 10, (2, 5))
    report = find_sums(model, tokens)
    assert [found.name for found in report.sums] == [":0"]
    assert report.refused == ()
    before = model(tokens)
    with scale_sums(model, report, 0.5):
        torch.testing.assert_close(model(tokens), before / 2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "resnet18": (lambda: resnet18(4), (3, 32, 32), 8, 0),
    "resnet50": (lambda: resnet50(2), (3, 32, 32), 16, 0),
    "one block": (lambda: ResNet(BasicBlock, [1, 0, 0, 0], 4), (3, 16, 16), 1, 0),
    "cifar": (lambda: CifarResNet(20), (3, 16, 16), 9, 0),
    "pre-activation": (PreActivation, (1, 5, 5), 2, 0),
    "dense": (Dense, (4,), 0, 0),
    "swin": (Swin, (3, 16, 16), 8, 4),
    "transformer": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False
        ),
        (3, 4),
        4,
        2,
    ),
    "sequential": (lambda: nn.Sequential(Shortcut(nn.Linear(4, 4), nn.ReLU())), (4,), 1, 0),
    "sum module": (lambda: nn.Sequential(Block(lambda m, a, b: ResidualSum()(a, b))), (4,), 1, 0),
    "no input": (lambda: nn.Sequential(nn.Linear(4, 4)), (4,), 0, 0),
}


def built(name: str) -> tuple[nn.Module, Tensor, SumReport]:
    make, shape, sums, refused = NETWORKS[name]
    model, x = make().eval(), torch.randn(2, *shape)
    report = find_sums(model, x)
    assert (len(report.sums), sum(each.calls for each in report.refused)) == (sums, refused)
    return model, x, report


@pytest.mark.parametrize("name", NETWORKS)
def test_finds_them_and_leaves_the_model_as_it_was(name: str) -> None:
    make, shape, *_ = NETWORKS[name]
    model, x = make(), torch.randn(2, *shape)
    before, weights, given = state(model), copy.deepcopy(model.state_dict()), x.clone()
    generator = torch.get_rng_state()
    report = find_sums(model, x)
    assert state(model) == before
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), generator)
    lines = str(report).splitlines()
    assert lines[-1] == report.summary
    assert len(lines) == 1 or len(lines) == 2 + len(report.sums) + len(report.refused)


class Halved(torch.overrides.TorchFunctionMode):
    """An independent oracle: halves every sum of two tensors with a batch axis."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        both = len(args) == 2 and all(isinstance(a, Tensor) and a.ndim > 1 for a in args)
        if both and func is Tensor.add:
            return out * 0.5
        return out.mul_(0.5) if both and func.__name__ == "add_" else out


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar", "pre-activation", "swin"])
@pytest.mark.parametrize("training", [False, True])
def test_scales_in_every_mode(name: str, training: bool) -> None:
    model, x, report = built(name)
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(model)
    with Halved():
        expected = twin(x)
        slopes = torch.autograd.grad(expected.square().sum(), list(twin.parameters()))
    plain = copy.deepcopy(model)(x)
    assert not torch.allclose(plain, expected)
    with scale_sums(model, report, 0.5) as scaled:
        found = model(x)
        torch.testing.assert_close(found, expected)
        again = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    assert (scaled.factor, scaled.sums) == (0.5, report.sums)
    for a, b in zip(again, slopes, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_remove_restores_everything() -> None:
    model, x, report = built("resnet18")
    before, out = state(model), model(x)
    scaled = scale_sums(model, report, 0.5)
    assert state(model) != before
    assert list(model.state_dict()) == list(copy.deepcopy(model).state_dict())
    scaled.remove()
    scaled.remove()
    assert state(model) == before
    assert torch.equal(model(x), out)
    assert torch._C._len_torch_function_stack() == 0


def test_in_place_sums_stay_in_place() -> None:
    seen = []

    def add(block: Block, a: Tensor, b: Tensor) -> Tensor:
        same = a
        a += b
        seen.append(same is a)
        return same

    model, x = nn.Sequential(Block(add)), torch.randn(2, 4)
    with scale_sums(model, find_sums(model, x), 0.5):
        torch.testing.assert_close(model(x), (model[0].linear(x) + x) / 2)
    assert all(seen)


def test_a_module_that_runs_twice_has_an_entry_a_run() -> None:
    block, x = Block(lambda m, a, b: a + b), torch.randn(2, 4)
    model = nn.Sequential(block, nn.ReLU(), block)
    report = find_sums(model, x)
    assert [(s.name, s.run) for s in report.sums] == [("0:0#0", 0), ("0:0#1", 1)]
    h = F.relu((block.linear(x) + x) / 2)
    with scale_sums(model, report, 0.5):
        torch.testing.assert_close(model(x), (block.linear(h) + h) / 2)


class Fickle(nn.Module):
    """Adds when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.sums = nn.Linear(4, 4), 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        for _ in range(self.sums):
            y = y + x
        return y


class Alternating(nn.Module):
    """Calls a module whose additions differ from run to run."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Fickle()

    def forward(self, x: Tensor) -> Tensor:
        self.part.sums = 1
        x = self.part(x)
        self.part.sums = 2
        return self.part(x)


def test_runs_that_differ_are_refused() -> None:
    report = find_sums(Alternating(), torch.randn(2, 4))
    assert report.sums == ()
    assert sum(each.calls for each in report.refused) == 3
    assert {each.reason for each in report.refused} == {
        "its caller makes other additions each time; give each its own module"
    }


def test_other_counts_than_the_examples_are_errors() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Fickle()), torch.randn(2, 4)
    with scale_sums(model, find_sums(model, x), 0.5):
        model[1].sums = 2
        with pytest.raises(SiteError, match=r"module '1' .*more additions than the 1"):
            model(x)
        model[1].sums = 0
        with pytest.raises(SiteError, match=r"module '1' .*made 0 additions, the example 1"):
            model(x)
        assert torch._C._len_torch_function_stack() == 0
        model[1].sums = 1
        model(x)


class Counting(nn.Module):
    """A layer that adds tensors of its own while training, as running statistics are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


@pytest.mark.parametrize("compiled", [False, True])
def test_what_layers_inside_add_is_theirs(compiled: bool) -> None:
    torch._dynamo.reset()
    block = Block(lambda m, a, b: m.inside(a) + b)
    block.inside = Counting()
    model, x = nn.Sequential(block), torch.randn(5, 4)
    with scale_sums(model, find_sums(model, x), 0.5):
        model.train()
        run = torch.compile(model, backend="eager") if compiled else model
        found = run(x)
        y = block.linear(x)
        mean = 0.1 * y.mean(0)
        torch.testing.assert_close(found, (y - mean + x) / 2)
        torch.testing.assert_close(block.inside.mean, mean)


def test_activations_by_hand_keep_what_they_add() -> None:
    transformers = pytest.importorskip("transformers")
    gelu = transformers.activations.NewGELUActivation()
    model, x = Block(lambda m, a, b: m.gelu(a) + b), torch.randn(2, 4)
    model.gelu = gelu
    report = find_sums(model, x)
    assert [found.name for found in report.sums] == [":0"]
    with scale_sums(model, report, 0.5):
        torch.testing.assert_close(model(x), (gelu(model.linear(x)) + x) / 2)


@pytest.mark.parametrize("sums_first", [True, False])
@pytest.mark.parametrize("name", ["one block", "pre-activation", "leaky"])
@pytest.mark.parametrize("compiled", [False, True])
def test_with_steering_in_both_orders(name: str, sums_first: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    if name == "leaky":
        model: nn.Module = nn.Sequential(Block(lambda m, a, b: m.act(a) + F.leaky_relu(b, 0.2)))
        model[0].act = nn.LeakyReLU(0.1)
        x = torch.randn(2, 4)
        report = find_sums(model, x)
    else:
        model, x, report = built(name)
    before = state(model)
    twin = copy.deepcopy(model)
    with flexure.steer(twin, beta=0.6, example=x):
        expected = _halving(twin, report, x)
    if sums_first:
        scaled = scale_sums(model, report, 0.5)
        steering = flexure.steer(model, beta=0.6, example=x)
    else:
        steering = flexure.steer(model, beta=0.6, example=x)
        assert len(find_sums(model, x).sums) == len(report.sums)
        scaled = scale_sums(model, report, 0.5)
    plain = lambda x: model(x)  # noqa: E731
    run = torch.compile(plain, fullgraph=True, backend="eager") if compiled else plain
    torch.testing.assert_close(run(x), expected)
    first, second = (scaled, steering) if sums_first else (steering, scaled)
    first.remove()
    assert not torch.allclose(model(x), expected)
    second.remove()
    assert state(model) == before


def _halving(model: nn.Module, report: SumReport, x: Tensor) -> Tensor:
    """By hand: each caller's forward under an oracle that sees no inner modules."""
    for caller in report.routes:
        module = model.get_submodule(caller)

        def halved(*args: Any, forward: Any = module.forward) -> Any:
            with HalvedOnce():
                return forward(*args)

        module.forward = halved
    try:
        return model(x)
    finally:
        for caller in report.routes:
            del model.get_submodule(caller).forward


class HalvedOnce(Halved):
    """Only sums that the caller's own code makes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import sys

        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "halved":
            if frame.f_code.co_name == "_call_impl":
                return func(*args, **(kwargs or {}))
            frame = frame.f_back
        return super().__torch_function__(func, types, args, kwargs)


class TestPyTorch:
    def test_copies_and_pickles_scale_too(self) -> None:
        model, x, report = built("cifar")
        with scale_sums(model, report, 0.5):
            expected = model(x)
            assert torch.equal(copy.deepcopy(model)(x), expected)
            assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
            model.load_state_dict(model.state_dict())

    @pytest.mark.parametrize("name", ["one block", "pre-activation", "sequential"])
    def test_compile_and_export(self, name: str) -> None:
        torch._dynamo.reset()
        model, x, report = built(name)
        with scale_sums(model, report, 0.5):
            expected = model(x)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            for _ in range(2):
                torch.testing.assert_close(compiled(x), expected)
            exported = torch.export.export(model, (x,), strict=False).module()
            torch.testing.assert_close(exported(x), expected)
        torch.testing.assert_close(compiled(x), model(x))
        assert torch._C._len_torch_function_stack() == 0

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant: bool) -> None:
        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inside = Block(lambda m, a, b: a + b)

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.inside, x, use_reentrant=reentrant)

        model, x = Checkpointed(), torch.randn(2, 4, requires_grad=True)
        with scale_sums(model, find_sums(model, x), 0.5):
            model(x).square().sum().backward()
            total = (model.inside.linear(x) + x) / 2
            expected = torch.autograd.grad(total.square().sum(), x)[0]
            torch.testing.assert_close(x.grad, expected)
        hides = Block(lambda m, a, b: checkpoint(torch.add, a, b, use_reentrant=reentrant))
        scaled = scale_sums(hides, find_sums(hides, x), 0.5)
        with scaled, pytest.raises(SiteError, match="Checkpoint the whole"):
            hides(x)

    def test_vmap_jvp_and_functional_call(self) -> None:
        model, x, report = built("sequential")
        with scale_sums(model, report, 0.5):
            expected = model(x)
            mapped = torch.func.vmap(lambda row: model(row[None])[0])(x)
            torch.testing.assert_close(mapped, expected)
            direction = torch.randn_like(x)
            _, slope = torch.func.jvp(model, (x,), (direction,))
            _, by_reverse = torch.autograd.functional.jvp(model, x, direction)
            torch.testing.assert_close(slope, by_reverse)
            doubled = {key: 2 * value for key, value in model.named_parameters()}
            called = torch.func.functional_call(model, doubled, (x,))
            linear = model[0][0]
            torch.testing.assert_close(called, (F.relu(2 * linear(x)) + x) / 2)

    def test_errors_and_interrupts_leave_no_mode(self) -> None:
        model, x, report = built("resnet18")
        with scale_sums(model, report, 0.5):
            expected = model(x)
            with pytest.raises(RuntimeError):
                model(torch.randn(2, 5, 32, 32))
            assert torch._C._len_torch_function_stack() == 0

            def interrupt(*_: object) -> None:
                raise KeyboardInterrupt

            handle = model.layer2[0].bn2.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(x)
            handle.remove()
            assert torch.equal(x + x, 2 * x)
            assert torch.equal(model(x), expected)
            assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("factor", [0.5, 1 / math.sqrt(2)])
def test_identities(factor: float) -> None:
    model = nn.Sequential(Block(lambda m, a, b: a + b), Block(lambda m, a, b: a + b))
    with torch.no_grad():
        for block in model:
            block.linear.weight.copy_(torch.eye(4))
    report = find_sums(model, torch.randn(1, 4))
    assert flexure.lipschitz_bound(model, (4,)).value == pytest.approx(4.0, rel=1e-9)
    with scale_sums(model, report, factor):
        bound = flexure.lipschitz_bound(model, (4,)).value
    assert bound == pytest.approx((2 * factor) ** 2, rel=1e-9)
    assert ResidualSum(factor)(torch.ones(2), torch.ones(2)).tolist() == pytest.approx(
        [2 * factor] * 2
    )
    assert f"{factor:g}" in repr(ResidualSum(factor))


def test_found_in_the_forward_of_a_wrapped_model() -> None:
    model, x, report = built("cifar")
    compiled = torch.compile(model, backend="eager")
    assert find_sums(compiled, x) == report
    with scale_sums(compiled, report, 0.5):
        scaled = model(x)
    with scale_sums(model, report, 0.5):
        assert torch.equal(model(x), scaled)
    assert not torch.equal(model(x), scaled)


class TestBadInput:
    @pytest.mark.parametrize(
        "factor", [0.0, math.nan, math.inf, "a", None, True, torch.tensor(0.5)]
    )
    def test_factor(self, factor: Any) -> None:
        model, _, report = built("cifar")
        with pytest.raises(FlexureError, match=r"expected a factor .* got .*; give"):
            scale_sums(model, report, factor)

    def test_twice(self) -> None:
        model, _, report = built("cifar")
        with scale_sums(model, report, 0.5):
            inside = state(model)
            with pytest.raises(SiteError, match="scaled already"):
                scale_sums(model, report, 0.5)
            assert state(model) == inside

    def test_another_model(self) -> None:
        with pytest.raises(SiteError, match=r"without a module 'layer1\.0'"):
            scale_sums(PreActivation(), built("cifar")[2], 0.5)

    @pytest.mark.parametrize("example", [torch.randn(4, 5), "text"])
    def test_example(self, example: Any) -> None:
        with pytest.raises(SiteError, match="example does not run"):
            find_sums(nn.Sequential(nn.Linear(4, 4)), example)

    def test_what_python_cannot_see_is_named(self) -> None:
        scripted = torch.jit.trace(Block(lambda m, a, b: a + b), torch.randn(2, 4))
        report = find_sums(nn.Sequential(nn.Linear(4, 4), scripted), torch.randn(2, 4))
        assert report.sums == ()
        assert [(each.name, each.caller) for each in report.refused] == [("TorchScript", "1")]


def test_a_resnet_adds_in_place_once_a_block() -> None:
    report = built("resnet18")[2]
    assert [found.caller for found in report.sums] == [
        f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)
    ]
    assert {found.kind for found in report.sums} == {"a += b"}
