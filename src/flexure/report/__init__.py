"""Reports: tables, pictures, and one self-contained HTML page.

Nothing here computes a result; results come in as numbers and go out as a page.
"""

from flexure.report.canvas import Curve, Picture
from flexure.report.page import Section, render, write_page
from flexure.report.plots import (
    Estimate,
    boundary,
    curves,
    estimates,
    histogram,
    over_depth,
    score_against_beta,
)
from flexure.report.search import (
    SearchLike,
    search_page,
    search_sections,
    search_summary,
    verdict,
)
from flexure.report.tables import Table, gain_text, percent, run_table, site_table, table_of
from flexure.report.train import flat_page, flat_sections, flat_summary
from flexure.report.train_sections import boundary_figure, noise_figure
from flexure.report.tune import tune_page, tune_sections, tune_summary

__all__ = [
    "Curve",
    "Estimate",
    "Picture",
    "SearchLike",
    "Section",
    "Table",
    "boundary",
    "boundary_figure",
    "curves",
    "estimates",
    "flat_page",
    "flat_sections",
    "flat_summary",
    "gain_text",
    "histogram",
    "noise_figure",
    "over_depth",
    "percent",
    "render",
    "run_table",
    "score_against_beta",
    "search_page",
    "search_sections",
    "search_summary",
    "site_table",
    "table_of",
    "tune_page",
    "tune_sections",
    "tune_summary",
    "verdict",
    "write_page",
]
