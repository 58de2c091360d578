"""Result files: strict JSON, atomic, complete."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from flexure.contracts import FlexureError
from flexure.record import check_writable, record, to_json, write_bytes, write_json


class Colour(Enum):
    RED = "red"


@dataclass
class Inner:
    scores: torch.Tensor
    _model: object = field(default=None)


@dataclass
class Outer:
    inner: Inner
    name: str = "x"


class Summarised:
    def to_dict(self) -> dict[str, float]:
        return {"a": math.inf}


def test_everything_a_result_holds_has_a_strict_json_form() -> None:
    payload = {
        "dataclass": Outer(Inner(torch.tensor([1.0, math.nan]), _model=object())),
        "summary": Summarised(),
        "numpy": [np.float32(0.5), np.int64(3), np.array([[1, 2]]), np.bool_(True)],
        "scalars": (1, True, None, -math.inf, torch.tensor(2), torch.tensor(True)),
        "others": [Path("a/b"), torch.float32, torch.device("cpu"), Colour.RED, {3, 1}, range(2)],
        0.5: "key",
    }
    text = json.dumps(to_json(payload), allow_nan=False)
    assert json.loads(text) == {
        "dataclass": {"inner": {"scores": [1.0, "nan"]}, "name": "x"},
        "summary": {"a": "inf"},
        "numpy": [0.5, 3, [[1, 2]], True],
        "scalars": [1, True, None, "-inf", 2, True],
        "others": [str(Path("a/b")), "torch.float32", "cpu", "red", [1, 3], [0, 1]],
        "0.5": "key",
    }


def test_what_has_no_json_form_is_refused_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "new" / "r.json", {"a": 1})
    with pytest.raises(FlexureError, match="object"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_an_interrupted_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json(tmp_path / "r.json", {"a": 1})

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"half")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_unwritable_folders_are_named_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(FlexureError, match="file"):
            check_writable(folder)
    with pytest.raises(FlexureError, match="file"):
        write_json(file / "r.json", {})
    assert check_writable(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_record_says_where_its_numbers_come_from(tmp_path: Path) -> None:
    made = record(config={"beta": 0.9}, seed=3, numbers={"gain": math.nan})
    assert made["config"] == {"beta": 0.9}
    assert made["seed"] == 3
    assert made["numbers"] == {"gain": "nan"}
    assert {"python", "torch", "numpy", "flexure"} <= set(made["versions"])
    assert made["versions"]["torch"] == torch.__version__
    assert made["date"].endswith("+00:00")
    assert made["commit"] is None or len(made["commit"].removesuffix("-dirty")) == 40
    write_json(tmp_path / "r.json", made)
