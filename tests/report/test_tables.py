"""Tables, and how numbers are written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flexure.contracts import FlexureError
from flexure.report import Table, gain_text, percent, points, site_table, table_of


def test_the_site_table_names_every_site_and_what_happens_to_it():
    site = SimpleNamespace(
        name="layer1.relu",
        kind="module",
        activation="ReLU",
        calls=2,
        axis=1,
        channels=None,
        action="swapped",
    )
    table = site_table(SimpleNamespace(sites=[site, site]))
    assert table.columns[0] == "path"
    assert table.rows == (("layer1.relu", "module", "ReLU", "2", "1", "–", "swapped"),) * 2
    assert table.numeric < set(table.columns)


def test_shares_and_differences():
    assert percent(0.9876) == "98.8 %"
    assert percent(0.9876, digits=2) == "98.76 %"
    assert points(0.0123) == "+1.23"
    assert points(-0.01) == "-1.00"
    assert gain_text(0.01, -0.002, 0.03) == "+1.00 points, 95 % interval -0.20 to +3.00"


def test_a_table_of_any_values():
    table = table_of(("a", "b"), [(1, None), ("x", 2.5)], "a")
    assert table.rows == (("1", "–"), ("x", "2.5"))
    assert table.numeric == {"a"}


def test_rows_and_columns_that_do_not_fit_are_refused():
    with pytest.raises(FlexureError, match="2 cells"):
        Table(("a", "b"), (("1", "2"), ("1",)))
    with pytest.raises(FlexureError, match="numeric"):
        Table(("a",), (), frozenset({"b"}))
