"""Whether a method fits a network, found out before any training, on a network that is dropped.

Training is `flat_run.py`'s.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import nn

from flexure.calling import call_model, check_logits, evaluating, logits_of, seeded, unwritten
from flexure.contracts import DataError, FlexureError
from flexure.methods.flat_methods import FlatMethod
from flexure.methods.flat_run import changed_network
from flexure.methods.flat_task import FlatTask
from flexure.processes import current_processes
from flexure.train.arguments import asking_input_gradient, cross_entropy, named
from flexure.train.step import Run, samples_in, shares
from flexure.train.update import Objective

__all__ = ["check_method"]

_FEWEST = 2  # samples: a BatchNorm in train mode takes no single one


def check_method(task: FlatTask, method: FlatMethod, seed: int, classes: int) -> None:
    """Applies a method to a network that is then dropped, to find out whether it can be.

    The network is changed as the method says, and its penalties and its perturbation are computed
    once, on two samples.

    Raises:
        FlexureError: it cannot, or the network does not take the data.
        DataError: the network has too few classes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its runs will warn of the same
        try:
            network, _ = changed_network(task, method, seed)
        except FlexureError as error:
            raise _unfit(method, error) from error
        model = task.space.wrap(network)
        _check_classes(task, model, classes)
        try:
            _try_objective(task, method, model, seed)
        except FlexureError as error:
            raise _unfit(method, error) from error


def _unfit(method: FlatMethod, error: FlexureError) -> FlexureError:
    remedy = "; or leave it out" if "; " in str(error) else "; leave it out"
    return type(error)(f"the method {method.name!r} does not fit: {error}{remedy}")


def _check_classes(task: FlatTask, model: nn.Module, classes: int) -> None:
    with evaluating(model), unwritten(model), torch.no_grad():
        logits = check_logits(logits_of(call_model(model, task.example)), None)
    if logits.shape[1] < classes:
        raise DataError(
            f"expected a network of the {classes} classes of the data, got one of "
            f"{logits.shape[1]}; make it with as many outputs (?num_classes={classes}, or the last "
            f"of ?sizes=)"
        )


def _try_objective(task: FlatTask, method: FlatMethod, model: nn.Module, seed: int) -> None:
    """Computes what is minimised on the example, as a first step of training would."""
    weighted, perturb = named(method.penalties()), method.perturb()
    labels = torch.zeros(_FEWEST, dtype=torch.long, device=task.device)
    if samples_in(task.example, None) < _FEWEST or not (weighted or perturb):
        return
    asks = bool(asking_input_gradient(model, weighted))
    run = Run(
        model, task.recipe.epochs, seed, current_processes(), task.device, None, cross_entropy, asks
    )
    with evaluating(model), seeded(seed):
        model.train()
        [step] = shares([(task.example, labels)], run, index=0, epoch=0)
        if perturb is not None:
            step = replace(step, x=perturb(step))
        Objective(weighted).parts(step.fresh())
