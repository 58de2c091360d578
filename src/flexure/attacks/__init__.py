"""Attacks on inputs, and models whose inputs are pixels within bounds."""

from flexure.attacks.adversarial import Adversarial
from flexure.attacks.bounded import Bounded
from flexure.attacks.evaluate import Robustness, robust_accuracy
from flexure.attacks.pgd import PGD

__all__ = ["PGD", "Adversarial", "Bounded", "Robustness", "robust_accuracy"]
