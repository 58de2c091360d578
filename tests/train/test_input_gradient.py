"""`Step.input_gradient`: each sample's own gradient, of one forward pass, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexure.contracts import FlexureError, Step
from flexure.train import fit
from tests.penalties.steps import labelled, step_of


@dataclass(frozen=True)
class Asking:
    """A penalty made of a function of the step."""

    value: Callable[[Step], Tensor]
    needs_input_gradient: ClassVar[bool] = True

    def __call__(self, step: Step) -> Tensor:
        return self.value(step)


def squared(step: Step) -> Tensor:
    return step.input_gradient().square().sum()


def refused(model: nn.Module, x, y: Tensor, value=squared, **settings) -> str:
    with pytest.raises(FlexureError) as error:
        fit(model, [(x, y)], epochs=1, seed=0, penalties={Asking(value): 1.0}, **settings)
    return str(error.value)


class Counting(nn.Module):
    def __init__(self, *, inplace: bool = False, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.ReLU(inplace=inplace),
            nn.Linear(3, 8),
            nn.BatchNorm1d(8) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(8, 3),
        ).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x)


def own_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for row, label in zip(x, y, strict=True):
        row = row[None].clone().requires_grad_()
        if int(label) == -100:
            rows.append(torch.zeros_like(row))
            continue
        loss = nn.functional.cross_entropy(model(row), label[None])
        rows += torch.autograd.grad(loss, row)
    return torch.cat(rows)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_are_the_samples_own_gradients(inplace: bool):
    x, y = labelled()
    before = x.clone()
    step = step_of(Counting(inplace=inplace), x, y)
    torch.testing.assert_close(step.input_gradient(), own_gradients(Counting(), x, y))
    other = step.input_gradient(x + 0.5)
    torch.testing.assert_close(other, own_gradients(Counting(), x + 0.5, y))
    assert torch.equal(x, before)


def test_ignored_samples_have_no_gradient_and_the_others_their_own():
    x, y = labelled()
    y = torch.where(torch.arange(6) % 4 == 1, -100, y)
    found = step_of(Counting(), x, y).input_gradient()
    torch.testing.assert_close(found, own_gradients(Counting(), x, y))
    assert not found[1].any()
    assert bool(found[0].any())


def test_a_mean_loss_of_one_s_own():
    x, _ = labelled()
    y = torch.randn(6, 3, dtype=torch.float64)
    step = step_of(Counting(), x, y, loss=lambda z, y: (z - y).square().sum(1).mean())
    row = x[2:3].clone().requires_grad_()
    loss = (Counting()(row) - y[2:3]).square().sum()
    torch.testing.assert_close(step.input_gradient()[2:3], *torch.autograd.grad(loss, row))


def test_one_forward_pass_for_the_loss_and_all_penalties():
    x, y = labelled()
    model = Counting()
    cached = []

    def twice(step: Step) -> Tensor:
        cached.append(step.input_gradient() is step.input_gradient())
        return squared(step) + step.output.square().sum()

    penalties = {Asking(squared): 1.0, Asking(twice): 0.1}
    fit(model, [(x, y)] * 2, epochs=3, seed=0, penalties=penalties)
    assert model.calls == 6
    assert cached == [True] * 6


def test_a_function_can_ask_and_others_work_as_before():
    seen = []

    def old(step: Step) -> Tensor:
        seen.append(step.x.requires_grad)
        return step.output.sum() * 0

    def asking(step: Step) -> Tensor:
        return squared(step)

    x, y = labelled()
    fit(Counting(), [(x, y)], epochs=1, seed=0, penalties={old: 1.0})
    asking.needs_input_gradient = True
    fit(Counting(), [(x, y)], epochs=1, seed=0, penalties={old: 1.0, asking: 1.0})
    assert seen == [False, True]
    with pytest.raises(FlexureError, match="needs_input_gradient = True"):
        fit(Counting(), [(x, y)], epochs=1, seed=0, penalties={squared: 1.0})


def test_it_is_that_of_the_perturbed_inputs():
    x, y = labelled()
    seen = []

    def look(step: Step) -> Tensor:
        seen.append(step.input_gradient().detach())
        return squared(step)

    fit(
        Counting(),
        [(x, y)],
        epochs=1,
        seed=0,
        penalties={Asking(look): 1.0},
        perturb=lambda step: step.x + 0.3,
    )
    torch.testing.assert_close(seen[0], own_gradients(Counting(), x + 0.3, y))


def test_another_pass_is_the_same_function_and_leaves_nothing():
    x, y = labelled()
    model = Counting(norm=True, dropout=0.5)
    step = step_of(model, x, y)
    torch.manual_seed(3)
    own = step.input_gradient()
    written = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = list(model.buffers())
    state, calls = torch.get_rng_state(), model.calls
    torch.testing.assert_close(step.input_gradient(x.clone()), own, rtol=0, atol=0)
    assert not torch.allclose(step.input_gradient(x + 1), own)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == calls
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in written.items())
    assert int(model.layers[2].num_batches_tracked) == 1
    # Nothing that a graph needs has been overwritten.
    (own.square().sum() + step.input_gradient(x + 1).square().sum() + step.loss).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_input_of_a_pass_may_depend_on_parameters():
    x, y = labelled()
    step = step_of(Counting(), x, y)
    shift = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def value(at: Tensor) -> Tensor:
        return step.input_gradient(x + at).square().sum()

    (slope,) = torch.autograd.grad(value(shift), shift)
    h = 1e-6
    with torch.no_grad():
        up, down = shift + h, shift - h
    difference = (value(up) - value(down)).detach() / (2 * h)
    assert float(slope) == pytest.approx(float(difference), rel=1e-6)


def test_named_inputs_with_a_mask():
    class Masked(Counting):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x * mask)

    x, y = labelled()
    mask = torch.arange(3) != 1
    given = {"x": x, "mask": mask.expand(6, 3)}
    found = step_of(Masked(), given, y).input_gradient()
    assert found.shape == (6, 3)
    assert not found[:, 1].any()
    fit(Masked(), [(given, y)], epochs=1, seed=0, penalties={Asking(squared): 1.0})


def test_attention_is_differentiated_twice():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu")
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1))

    x, y = torch.randn(6, 5, 4), torch.arange(6) % 3
    fit(Attending(), [(x, y)], epochs=1, seed=0, penalties={Asking(squared): 1.0})


def test_bfloat16_gradients_are_those_of_the_loop_s_output():
    x, y = labelled()
    exact = step_of(Counting().float(), x.float(), y).input_gradient()
    rounded = step_of(
        Counting().float(), x.float(), y, autocast=("cpu", torch.bfloat16)
    ).input_gradient()
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)


class Detaching(Counting):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class TwoInputs(Counting):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(x + z)


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 2


class Once(Counting):
    def forward(self, x: Tensor) -> Tensor:
        return Rounding.apply(super().forward(x))


def test_models_that_have_no_such_gradient():
    x, y = labelled()
    assert "depends on the input, got one that does not" in refused(Detaching(), x, y)
    assert "exactly one floating-point tensor, got 2" in refused(TwoInputs(), (x, x), y)
    embedding = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3))
    assert "got 0" in refused(embedding, torch.ones(6, 2, dtype=torch.int64), y)
    assert "differentiated twice" in refused(Once(), x, y)
    said = refused(Counting(), x, y, lambda step: step.input_gradient(step.x[:2]).sum())
    assert "inputs like those of the step, torch.float64 (6, 3), got torch.float64 (2, 3)" in said
    assert "one input for each of 6 samples" in refused(Counting(), x[:5], y)


def in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def by_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward)
    return model


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (torch.compile, "got one compiled by torch.compile"),
        (in_place, "got one compiled by torch.compile"),
        (by_forward, "got one compiled by torch.compile"),
        (lambda m: nn.Sequential(nn.Identity(), torch.compile(m)), "got 1 in it compiled by"),
        (lambda m: torch.jit.trace(m, torch.ones(2, 3)), "got one made by torch.jit"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_networks_are_refused_before_the_first_step(change, where: str):
    x, y = labelled()
    model = change(nn.Linear(3, 3))
    said = refused(model, x.float(), y)
    assert where in said
    assert "as Asking needs it" in said
    assert "before compiling it" in said


def test_what_is_left_out_of_compilation_is_no_compiled_network():
    class Left(Counting):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    x, y = labelled()
    fit(Left(), [(x, y)], epochs=1, seed=0, penalties={Asking(squared): 1.0})


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = Counting(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_activation_checkpoints_need_another_setting():
    x, y = labelled()
    assert "use_reentrant=False" in refused(Checkpointed(True), x, y)
    step = step_of(Checkpointed(False), x, y)
    assert torch.equal(step.input_gradient(), step_of(Counting(), x, y).input_gradient())
