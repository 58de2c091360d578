"""Tables, and how numbers are written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexure.contracts import FlexureError
from flexure.record import record
from flexure.report import Table, gain_text, percent, run_table, site_table, table_of
from flexure.surgery.census import sites
from flexure.surgery.sites import SiteReport


def test_the_site_table_names_every_site_and_what_happens_to_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    report = sites(model, torch.zeros(1, 3))
    table = site_table(report)
    assert [dict(zip(table.columns, row, strict=True)) for row in table.rows] == report.rows()
    assert [row[0] for row in table.rows] == ["1", "3"]
    assert {"calls", "channels"} < table.numeric


def test_a_network_without_sites_gives_an_empty_table():
    assert site_table(SiteReport(())).rows == ()


def test_shares_and_differences():
    assert percent(0.9876) == "98.8\N{NO-BREAK SPACE}%"
    assert percent(0.9876, digits=2) == "98.76\N{NO-BREAK SPACE}%"
    assert gain_text(1, -0.2, 3) == "+1.00 points (95\N{NO-BREAK SPACE}% interval -0.20 to +3.00)"


def test_a_table_of_any_values():
    table = table_of(("a", "b"), [(1, None), ("x", 2.5)], "a")
    assert table.rows == (("1", "–"), ("x", "2.5"))
    assert table.numeric == {"a"}


def test_how_a_run_was_made_is_read_from_its_result_file():
    payload = record(config={"a": {"betas": (0.5, 1.0)}, "b": None}, seed=1, numbers={})
    rows = dict(run_table(payload).rows)
    assert rows["a betas"] == "0.5, 1.0"
    assert rows["b"] == "–"
    assert rows["version torch"] == torch.__version__
    assert {"commit", "platform", "date"} <= set(rows)


def test_rows_and_columns_that_do_not_fit_are_refused():
    with pytest.raises(FlexureError, match="2 cells"):
        Table(("a", "b"), (("1", "2"), ("1",)))
    with pytest.raises(FlexureError, match="numeric"):
        Table(("a",), (), frozenset({"b"}))
