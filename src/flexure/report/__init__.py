"""Reports: tables, pictures, and one self-contained HTML page.

Nothing here computes a result; results come in as numbers and go out as a page.
"""

from flexure.report.page import Section, render, write_page
from flexure.report.plots import (
    Curve,
    Estimate,
    Picture,
    boundary,
    curves,
    estimates,
    score_against_beta,
)
from flexure.report.tables import Table, gain_text, percent, points, site_table, table_of

__all__ = [
    "Curve",
    "Estimate",
    "Picture",
    "Section",
    "Table",
    "boundary",
    "curves",
    "estimates",
    "gain_text",
    "percent",
    "points",
    "render",
    "score_against_beta",
    "site_table",
    "table_of",
    "write_page",
]
