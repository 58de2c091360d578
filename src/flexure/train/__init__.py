"""Training: the one loop, `fit`."""

from flexure.train.fit import History, fit

__all__ = ["History", "fit"]
