"""Bytes kept for backward and bytes at the peak, where the answer is known by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexure.memory import peak_bytes, saved_bytes

KIB = 256  # float32 elements


def leaf(kib: int) -> Tensor:
    return torch.randn(kib * KIB, requires_grad=True)


# --- saved_bytes ---


def test_what_a_product_saves():
    x, y = leaf(2), leaf(2)
    assert saved_bytes(lambda: x * y) == 4 * 1024
    assert saved_bytes(lambda: x * y, exclude=[x]) == 2 * 1024
    assert saved_bytes(lambda: x * x) == 2 * 1024  # each storage once
    assert saved_bytes(lambda: x + y) == 0
    assert saved_bytes(lambda: x * 2) == 0


def test_an_output_that_its_own_node_saves():
    x = leaf(3)
    assert saved_bytes(x.exp) == 3 * 1024
    assert saved_bytes(lambda: x.exp().exp()) == 6 * 1024
    assert saved_bytes(lambda: x.exp().square()) == 3 * 1024


def test_a_saved_view_keeps_its_whole_storage():
    x = leaf(4)
    assert saved_bytes(lambda: (x * 1)[:8].square()) == 4 * 1024


def test_only_what_the_result_holds_counts():
    x = leaf(2)

    def run():
        (x * 1).square().sum()
        return (x * 1).sin()

    assert saved_bytes(run) == 2 * 1024
    assert saved_bytes(lambda: [run(), run()][:1]) == 2 * 1024

    def after_backward():
        loss = (x * 1).square().sum()
        loss.backward()
        return loss

    assert saved_bytes(after_backward) == 0


def test_nothing_is_saved_without_gradients():
    x = leaf(2)
    with torch.no_grad():
        assert saved_bytes(lambda: x.exp()) == 0
    assert saved_bytes(lambda: x.detach().exp()) == 0


def test_a_layer_by_hand():
    conv = nn.Conv2d(4, 8, 3, padding=1)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    own = list(conv.parameters())
    assert saved_bytes(lambda: F.relu(conv(x)), exclude=[x, *own]) == 2 * 8 * 64 * 4
    assert saved_bytes(lambda: F.relu(conv(x)), exclude=own) == (2 * 8 + 2 * 4) * 64 * 4
    size = sum(p.numel() for p in [conv.weight]) * 4
    assert saved_bytes(lambda: conv(x)) == 2 * 4 * 64 * 4 + size


def test_custom_functions_and_checkpoints():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x * x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            return grad * 3 * ctx.saved_tensors[1]

    x = leaf(2)
    assert saved_bytes(lambda: Cube.apply(x * 1)) == 4 * 1024
    deep = lambda x: x.sin().sin().sin()  # noqa: E731
    assert saved_bytes(lambda: deep(x), exclude=[x]) == 4 * 1024


def test_counting_changes_no_gradient():
    x = leaf(1)
    results = []

    def run():
        loss = (x.exp() * x.sin()).sum()
        results.append(torch.autograd.grad(loss, x)[0])
        return loss

    saved_bytes(run)
    peak_bytes(run)
    run()
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


# --- peak_bytes ---


def test_temporaries_are_freed():
    x = torch.randn(2 * KIB)
    assert peak_bytes(lambda: x + 1) == 2 * 1024
    assert peak_bytes(lambda: [x + 1, x + 1]) == 4 * 1024

    def chain():
        y = x
        for _ in range(10):
            y = y + 1
        return y

    assert peak_bytes(chain) == 4 * 1024
    assert peak_bytes(lambda: [chain() for _ in range(3)]) == (2 + 4 + 2) * 1024


def test_what_was_there_does_not_count():
    x = torch.randn(2 * KIB)
    assert peak_bytes(lambda: x.view(2, -1).add_(1).t()) == 0
    assert peak_bytes(lambda: x.view(-1)[4:] * 1) == 2 * 1024 - 16
    assert peak_bytes(lambda: None) == 0


def test_all_ways_to_make_tensors():
    assert peak_bytes(lambda: torch.empty(KIB)) == 1024
    assert peak_bytes(lambda: torch.tensor([0.0] * KIB)) == 1024
    assert peak_bytes(lambda: torch.randn(4, KIB).chunk(4)) == 4 * 1024
    assert peak_bytes(lambda: torch.zeros(KIB).expand(8, KIB)) == 1024
    assert peak_bytes(lambda: torch.empty(0).resize_(KIB)) == 1024
    assert peak_bytes(lambda: torch.empty(KIB, device="meta")) == 0
    assert peak_bytes(lambda: torch.empty(KIB, device="meta"), device="meta") == 1024


def test_backward_frees_what_it_has_used():
    n, x = 8, leaf(1)

    def run():
        y = x
        for _ in range(n):
            y = y.exp()
        y.backward(torch.ones_like(y))

    # In the second step of backward: n results (the last one is still y), the gradient given, the
    # gradient so far and the next.
    assert peak_bytes(run) == (n + 3) * 1024
    # The gradient of x stays from then on; another is added to it.
    assert peak_bytes(lambda: run() or run()) == (n + 3) * 1024
    x.grad = None
    assert peak_bytes(lambda: run() or run()) == (n + 4) * 1024


def test_checkpointing_lowers_the_peak():
    def block(x):
        for _ in range(4):
            x = x.exp()
        return x

    def run(wrap):
        def forward():
            y = x
            for _ in range(4):
                y = wrap(y)
            y.backward(torch.ones_like(y))

        return forward

    x = leaf(1)
    plain = peak_bytes(run(block))
    x.grad = None
    light = peak_bytes(run(lambda y: checkpoint(block, y, use_reentrant=False)))
    assert plain == (16 + 3) * 1024
    assert 9 * 1024 <= light <= 12 * 1024


def test_an_optimisers_state_counts():
    p = nn.Parameter(torch.randn(KIB))
    p.grad = torch.ones(KIB)
    for foreach in (False, True):
        optimizer = torch.optim.Adam([p], foreach=foreach)
        assert 2 * 1024 <= peak_bytes(optimizer.step) <= 6 * 1024


def test_an_error_inside_passes_through():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saved_bytes(lambda: 1 / 0)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_on_a_gpu():
    x = torch.randn(2**20, device="cuda")
    assert peak_bytes(lambda: (x + 1) * 2, device="cuda") == 2 * 2**22
