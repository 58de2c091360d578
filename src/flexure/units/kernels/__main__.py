"""`python -m flexure.units.kernels` builds the kernels and says where they are."""

from __future__ import annotations

import sys

from flexure.contracts import FlexureError
from flexure.units.kernels.build import build


def main() -> int:
    """Prints the path of the library; 1 if there is none."""
    try:
        print(build())
    except FlexureError as error:
        print(f"no kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
