"""Compiled kernels for the units: optional, equal to the pure path of `blocked.py` to 1e-6.

`build` compiles them (`python -m flexure.units.kernels` does it from a shell), `load` finds what
was built before. Nothing is ever compiled unasked, and without a build everything works in pure
Python. The environment variable FLEXURE_KERNELS=0 turns them off.

Building and finding live in `build.py`, how tensors are handed over in `calls.py`, the arithmetic
in `ctu.c`. When the kernel is used is decided in `blocked.py`.
"""

from flexure.units.kernels.build import build, load

__all__ = ["build", "load"]
