"""Addresses, their options, and optional libraries."""

from __future__ import annotations

import sys

import pytest

from flexure.addresses import (
    existing_path,
    first_line,
    import_extra,
    look_up,
    split_options,
)
from flexure.contracts import AddressError, FlexureError, MissingExtraError


def test_look_up_splits_at_the_first_colon() -> None:
    assert look_up("a:b:c", {"a": 1}, kind="data") == (1, "b:c")


@pytest.mark.parametrize("address", ["c:x", "a", "a:", "", ":x"])
def test_unknown_prefix_lists_the_known_ones(address: str) -> None:
    with pytest.raises(AddressError, match=r"a:, b:") as caught:
        look_up(address, {"a": 1, "b": 2}, kind="data")
    assert repr(address) in str(caught.value)


def test_options_undo_percent_but_keep_plus() -> None:
    name, options = split_options("net?w=/a+b%20c&n=3", known=("w", "n"))
    assert (name, options) == ("net", {"w": "/a+b c", "n": "3"})
    assert split_options("net", known=("w",)) == ("net", {})


@pytest.mark.parametrize("query", ["x=1", "w", "w=", "w=1&w=2"])
def test_wrong_options_are_named(query: str) -> None:
    with pytest.raises(AddressError, match=r"w=\.\.\."):
        split_options(f"net?{query}", known=("w",))


def test_existing_path(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "f").write_text("")
    assert existing_path("~/f", folder=False) == tmp_path / "f"
    with pytest.raises(AddressError, match="something else"):
        existing_path("~/f", folder=True)
    with pytest.raises(AddressError, match="nothing is there"):
        existing_path("~/g", folder=False)


def test_missing_library_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "no_such_library", None)
    with pytest.raises(MissingExtraError, match="run: pip install thing") as caught:
        import_extra("no_such_library", install="pip install thing")
    assert isinstance(caught.value, FlexureError)
    assert isinstance(caught.value, ImportError)


def test_library_that_does_not_load_counts_as_missing(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_lib.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match="operator nms"):
        import_extra("broken_lib", install="pip install thing")


def test_first_line() -> None:
    assert first_line(ValueError("\n one \n two")) == "ValueError: one"
    assert first_line(KeyError()) == "KeyError"
