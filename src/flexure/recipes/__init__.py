"""Experiments of the papers and of the demo: each has a frozen Config and a `run(config, out)`."""

from flexure.recipes import demo, digits, spiral

__all__ = ["demo", "digits", "spiral"]
