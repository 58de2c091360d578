"""Finding the activations of a network and putting units in their place."""

from flexure.surgery.census import sites
from flexure.surgery.install import Installation, Plan, install, plan
from flexure.surgery.sites import Refusal, Site, SiteReport, Where

__all__ = [
    "Installation",
    "Plan",
    "Refusal",
    "Site",
    "SiteReport",
    "Where",
    "install",
    "plan",
    "sites",
]
