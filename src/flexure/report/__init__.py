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
from flexure.report.search import (
    SearchLike,
    search_page,
    search_sections,
    search_summary,
    verdict,
)
from flexure.report.tables import Table, gain_text, percent, run_table, site_table, table_of

__all__ = [
    "Curve",
    "Estimate",
    "Picture",
    "SearchLike",
    "Section",
    "Table",
    "boundary",
    "curves",
    "estimates",
    "gain_text",
    "percent",
    "render",
    "run_table",
    "score_against_beta",
    "search_page",
    "search_sections",
    "search_summary",
    "site_table",
    "table_of",
    "verdict",
    "write_page",
]
