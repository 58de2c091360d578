"""Groups of activation sites that share a dial: by layer, each site apart, or as given.

What dials they are given is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from flexure.contracts import FlexureError

__all__ = ["ALL_SITES", "TOP_LEVEL", "Groups", "site_groups"]

Groups: TypeAlias = "str | Mapping[str, str | Sequence[str]]"

ALL_SITES = "all sites"
"""The group of a dial that all sites share."""

TOP_LEVEL = "top level"
"""The group of the sites that are not inside a module of the network."""


def site_groups(names: Sequence[str], groups: Groups) -> dict[str, tuple[str, ...]]:
    """Group -> the sites in it, in the network's order; every site is in one group.

    Args:
        names: of the sites.
        groups: "layers": by the first part of the name (`layer1` of `layer1.0.act1`), those without
            one together; "sites": each apart; or name -> patterns, of which the first that matches
            a site counts.

    Raises:
        FlexureError: other groups, a group without sites, a site without a group, or a group whose
            name means something else.
    """
    found: dict[str, tuple[str, ...]]
    if groups == "sites":
        found = {name: (name,) for name in names}
    elif groups == "layers":
        found = _layers(names)
    elif isinstance(groups, Mapping) and groups:
        found = _given(names, groups)
    else:
        raise FlexureError(
            f"expected groups to be 'layers', 'sites', or name -> patterns of sites, got {groups!r}"
        )
    if ALL_SITES in found:
        raise FlexureError(
            f"expected other names of groups than {ALL_SITES!r}, which is the dial that all sites "
            f"share; give groups with other names"
        )
    return found


def _layers(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        layer = _first(name)
        if layer == TOP_LEVEL:
            raise FlexureError(
                f"expected no module called {TOP_LEVEL!r}, which is the group of sites in no "
                f"module; give groups with names of their own"
            )
        found[layer or TOP_LEVEL] = (*found.get(layer or TOP_LEVEL, ()), name)
    return found


def _first(name: str) -> str:
    """The outermost module that a site is in; nothing for those in none."""
    inside = name.replace(":", ".")
    return inside.partition(".")[0] if "." in inside else ""


def _given(
    names: Sequence[str], groups: Mapping[str, str | Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {str(group): [] for group in groups}
    lone = []
    for name in names:
        group = next(
            (g for g, p in groups.items() if any(fnmatchcase(name, one) for one in _patterns(p))),
            None,
        )
        if group is None:
            lone.append(name)
        else:
            found[str(group)].append(name)
    if lone:
        raise FlexureError(
            f"expected every site in a group, got none for {', '.join(lone)}; add a group '*'"
        )
    if empty := [group for group, sites in found.items() if not sites]:
        raise FlexureError(
            f"expected sites in every group, got none in {', '.join(empty)}; the sites are "
            f"{', '.join(names)}"
        )
    return {group: tuple(sites) for group, sites in found.items()}


def _patterns(patterns: str | Sequence[str]) -> Sequence[str]:
    return (patterns,) if isinstance(patterns, str) else patterns
