"""Accuracy on corrupted images: what is counted, how it is averaged, and how it resumes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.contracts import AddressError, DataError, FlexureError, LabelledData
from flexure.data import CORRUPTIONS, Corrupted, from_arrays
from flexure.measure.intervals import t_interval
from flexure.methods.corruption_accuracy_result import CorruptedCell, CorruptionAccuracy

SIDE, N, CLASSES = 12, 9, 3

FIRST = 4
"""Images that are preprocessed once more, to tell preprocessings apart."""


def scaled(x: Tensor) -> Tensor:
    return x.float() / 255


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(),
        nn.Linear(4 * (SIDE - 2) ** 2, CLASSES),
    )  # fmt: skip


def images(seed: int = 0, count: int = N) -> LabelledData:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return from_arrays(x, np.arange(count) % CLASSES)


def right(model: nn.Module, data: LabelledData) -> Tensor:
    """One image at a time, by hand."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        answers = [int(model(scaled(data[i])[None]).argmax()) for i in range(len(data))]
    return torch.tensor(answers) == data.labels


def test_every_cell_against_one_image_at_a_time() -> None:
    model, reference, data = network(0), network(1), images()
    found = flexure.corruption_accuracy(
        model, data, preprocess=scaled, corruptions=["shot_noise", "fog"], severities=[2, 5],
        seed=3, reference=reference, batch_size=4, shifts={"other": images(1)},
    )  # fmt: skip
    assert torch.equal(found.clean.right, right(model, data))
    assert torch.equal(found.clean.reference, right(reference, data))
    assert torch.equal(found.shifts[0].right, right(model, images(1)))
    assert [(c.name, c.severity, c.group) for c in found.cells] == [
        ("shot_noise", 2, "noise"), ("shot_noise", 5, "noise"),
        ("fog", 2, "weather"), ("fog", 5, "weather"),
    ]  # fmt: skip
    for cell in found.cells:
        corrupted = Corrupted(data, cell.name, cell.severity, seed=3)
        assert torch.equal(cell.right, right(model, corrupted))
        assert torch.equal(cell.reference, right(reference, corrupted))
    assert found.cell("fog", 5) is found.cells[3]
    with pytest.raises(KeyError):
        found.cell("fog", 1)


def test_all_fifteen_by_default_and_the_models_stay_as_they_are() -> None:
    model = network(0).train()
    before = copy.deepcopy(model.state_dict())
    found = flexure.corruption_accuracy(
        model, images(count=2), preprocess=scaled, severities=[1], seed=0
    )
    assert found.corruptions == tuple(CORRUPTIONS)
    assert found.groups == ("noise", "blur", "weather", "digital")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    text = str(found)
    assert "* frost: a generated texture, not the photographs" in text
    assert "frost*" in text
    assert "not with published numbers" in text
    assert "errors/errors" not in text


def test_batch_size_does_not_matter() -> None:
    given = {"preprocess": scaled, "corruptions": ["gaussian_noise"], "seed": 1}
    one, other = (
        flexure.corruption_accuracy(network(0), images(), batch_size=b, **given) for b in (1, 128)
    )
    pairs = zip(one.cells, other.cells, strict=True)
    assert all(torch.equal(a.right, b.right) for a, b in pairs)


# Means over corruptions


def made(
    table: dict[tuple[str, str, int], Tensor], others: dict[tuple[str, str, int], Tensor] | None
) -> CorruptionAccuracy:
    cells = tuple(
        CorruptedCell(name, group, severity, hits, others and others[name, group, severity])
        for (name, group, severity), hits in table.items()
    )
    n = len(cells[0].right)
    everything = torch.ones(n, dtype=torch.bool)
    clean = CorruptedCell("clean", "clean", None, everything, everything if others else None)
    return CorruptionAccuracy(clean, cells)


KEYS = [
    (name, group, s) for name, group in (("fog", "weather"), ("jpeg", "digital")) for s in (1, 2)
]


def drawn(n: int, p: float, seed: int) -> dict[tuple[str, str, int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(n, generator=generator) < p for key in KEYS}


def test_means_are_over_images_not_over_cells() -> None:
    """One image's corrupted versions are one draw: four copies of a cell tell no more than one."""
    hits = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.6
    found = made(dict.fromkeys(KEYS, hits), None)
    alone = made({KEYS[0]: hits}, None)
    assert found.mean.accuracy == alone.mean.accuracy
    width = found.mean.accuracy.high - found.mean.accuracy.low
    independent = made(drawn(200, 0.6, 1), None).mean.accuracy
    assert independent.high - independent.low < 0.75 * width


def test_means_and_intervals_by_hand() -> None:
    table, others = drawn(300, 0.7, 2), drawn(300, 0.6, 3)
    found = made(table, others)
    x, z = (torch.stack(list(part.values())).double().mean(0) for part in (table, others))
    mean = found.mean
    assert mean.cells == 4
    assert mean.accuracy.mean == pytest.approx(float(x.mean()))
    assert mean.reference_accuracy.mean == pytest.approx(float(z.mean()))
    assert mean.difference.mean == pytest.approx(float((x - z).mean()))
    for values, interval in ((x, mean.accuracy), (x - z, mean.difference)):
        error = values.std() / len(values) ** 0.5
        low, high = t_interval(values.mean(), error, torch.tensor(len(values)), level=0.95)
        # Those of the result hold near the ends too, which moves them a little.
        assert interval.low == pytest.approx(float(low), abs=0.005)
        assert interval.high == pytest.approx(float(high), abs=0.005)
    fog = torch.stack([table[key] for key in KEYS[:2]]).double().mean()
    assert found.over("fog").accuracy.mean == pytest.approx(float(fog))
    assert found.over("weather").accuracy == found.over("fog").accuracy
    severe = torch.stack([table[key] for key in KEYS if key[2] == 2]).double().mean()
    assert found.at(2).accuracy.mean == pytest.approx(float(severe))
    for ask in (lambda: found.over("snow"), lambda: found.at(3)):
        with pytest.raises(KeyError):
            ask()


def test_errors_ratio_is_summed_over_severities_first() -> None:
    def hits(count: int) -> Tensor:
        return torch.arange(10) < count

    table = dict(zip(KEYS, map(hits, (9, 5, 8, 8)), strict=True))
    others = dict(zip(KEYS, map(hits, (8, 8, 0, 10)), strict=True))
    found = made(table, others)
    assert found.over("fog").errors_ratio == pytest.approx((1 + 5) / (2 + 2))
    assert found.over("jpeg").errors_ratio == pytest.approx((2 + 2) / (10 + 0))
    assert found.mean.errors_ratio == pytest.approx((6 / 4 + 4 / 10) / 2)
    assert "mCE, with this reference" in str(found)
    assert np.isnan(found.clean.errors_ratio)  # the reference makes no error


def test_printed_and_json() -> None:
    found = made(drawn(50, 0.7, 2), drawn(50, 0.6, 3))
    rows = found.rows()
    assert [row["images"] for row in rows] == [
        "clean", "fog", "jpeg", "weather", "digital", "all corruptions",
    ]  # fmt: skip
    assert rows[1]["2"] == f"{100 * found.cell('fog', 2).accuracy.value:.1f}"
    assert all(row["images"] in str(found) for row in rows)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["cells"][0]["accuracy"]["value"] == found.cells[0].accuracy.value
    assert len(told["cells"][0]["right"]) == 50
    names = [mean["name"] for mean in told["means"]]
    assert names == [
        "fog", "jpeg", "weather", "digital", "severity 1", "severity 2", "all corruptions",
    ]  # fmt: skip


def test_shifts_alone() -> None:
    found = flexure.corruption_accuracy(
        network(0), images(), preprocess=scaled, corruptions=(), shifts={"blue": images(2)}
    )
    assert found.mean is None
    assert [row["images"] for row in found.rows()] == ["clean", "blue"]
    assert not found.notes


# Official files


def test_official_files_instead_of_generated_ones(tmp_path: Path) -> None:
    data = images()
    rng = np.random.default_rng(4)
    files = rng.integers(0, 256, (5 * (N + 3), SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.tile([*data.labels.tolist(), 0, 1, 2], 5)
    for name in ("fog", "spatter"):
        np.save(tmp_path / f"{name}.npy", files)
    np.save(tmp_path / "labels.npy", labels)
    model = network(0)
    given = {"preprocess": scaled, "severities": [2], "sources": f"cifar10-c:{tmp_path}"}
    found = flexure.corruption_accuracy(model, data, corruptions=["fog", "spatter"], **given)
    expected = right(model, from_arrays(files[N + 3 : 2 * N + 3], data.labels.numpy()))
    assert torch.equal(found.cell("fog", 2).right, expected)
    assert [cell.group for cell in found.cells] == ["weather", "extra"]
    assert not found.notes
    with pytest.raises(AddressError, match="snow"):
        flexure.corruption_accuracy(model, data, corruptions=["snow"], **given)
    shuffled = from_arrays(np.stack([data[i].numpy() for i in range(N)]), labels[1 : N + 1])
    with pytest.raises(DataError, match="versions of the 9 images"):
        flexure.corruption_accuracy(model, shuffled, corruptions=["fog"], **given)


# Resuming


class Over:
    """Preprocessings that look alike, and may differ; they count their calls."""

    def __init__(self, scale: float, seen: list[int] | None = None) -> None:
        self.scale, self.seen = scale, [] if seen is None else seen

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return x.float() / self.scale

    def __repr__(self) -> str:
        return "Over()"


def over(scale: float) -> Callable[[Tensor], Tensor]:
    """Functions of the same lines, likewise."""
    return lambda x: x.float() / scale


def test_resumes_and_takes_more(tmp_path: Path) -> None:
    data = images()
    seen: list[int] = []
    given = {
        "preprocess": Over(255.0, seen), "reference": network(1), "seed": 3,
        "shifts": {"other": images(1)}, "resume": tmp_path / "kept",
    }  # fmt: skip
    first = flexure.corruption_accuracy(
        network(0), data, corruptions=["fog"], severities=[1], **given
    )
    assert len(seen) == FIRST + 3 * N
    more = flexure.corruption_accuracy(
        network(0), data, corruptions=["fog", "snow"], severities=[1, 2], **given
    )
    assert len(seen) == 2 * FIRST + (3 + 3) * N
    fresh = flexure.corruption_accuracy(
        network(0), data, corruptions=["fog", "snow"], severities=[1, 2],
        **(given | {"resume": None}),
    )  # fmt: skip
    assert more.to_dict() == fresh.to_dict()
    assert first.cells[0].to_dict() == more.cells[0].to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"reference": None},
        {"constants": "imagenet-c"},
        {"preprocess": nn.Identity()},
        {"data": images(5)},
        {"model": network(2)},
    ],
)
def test_other_work_is_not_resumed(change: dict, tmp_path: Path) -> None:
    given = {
        "model": network(0), "data": images(), "preprocess": scaled, "reference": network(1),
        "seed": 3, "corruptions": (), "resume": tmp_path,
    }  # fmt: skip
    flexure.corruption_accuracy(**given)
    with pytest.raises(FlexureError, match="evaluation"):
        flexure.corruption_accuracy(**(given | change))


@pytest.mark.parametrize("make", [Over, over])
def test_alike_preprocessings_are_told_apart_readably(
    make: Callable[[float], Callable[[Tensor], Tensor]], tmp_path: Path
) -> None:
    given = {"corruptions": (), "resume": tmp_path}
    for _ in range(2):
        flexure.corruption_accuracy(network(0), images(), preprocess=make(255.0), **given)
    with pytest.raises(FlexureError, match="with another preprocessing; give another folder"):
        flexure.corruption_accuracy(network(0), images(), preprocess=make(-25.0), **given)


@pytest.mark.parametrize("package", ["numpy", "scipy", "pillow"])
def test_other_versions_of_what_corrupts_are_other_work(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"preprocess": scaled, "corruptions": (), "resume": tmp_path}
    flexure.corruption_accuracy(network(0), images(), **given)
    own = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == package else own(name))
    with pytest.raises(FlexureError, match=rf"another {package} \(.* there, 0\.1 here\)"):
        flexure.corruption_accuracy(network(0), images(), **given)


@pytest.mark.parametrize("times", ["new", "kept"])
def test_changed_official_files_are_counted_anew(times: str, tmp_path: Path) -> None:
    """By their sizes and times; with these put back, by images that are looked at."""
    data, rng = images(), np.random.default_rng(4)
    path = tmp_path / "fog.npy"
    np.save(tmp_path / "labels.npy", np.tile(data.labels.numpy(), 5))
    found = []
    for turn, keep in enumerate((None, tmp_path / "kept", tmp_path / "kept", None)):
        if turn != 2:
            files = rng.integers(0, 256, (5 * N, SIDE, SIDE, 3), dtype=np.uint8)
        if turn < 3:
            np.save(path, np.flip(files, 0) if turn == 2 else files)
        if times == "kept":
            os.utime(path, ns=(10**18, 10**18))
        found.append(
            flexure.corruption_accuracy(
                network(0), data, preprocess=scaled, corruptions=["fog"], severities=[1, 4],
                sources=f"cifar10-c:{tmp_path}", resume=keep,
            )
        )  # fmt: skip
    rights = [[cell.right.tolist() for cell in each.cells] for each in found]
    assert rights[1] != rights[2] == rights[3]


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corruptions": ["rain"]}, "'rain'"),
        ({"severities": [0]}, r"1, \.\.\., 5"),
        ({"severities": []}, r"1, \.\.\., 5"),
        ({"severities": [1.0]}, r"whole numbers 1, \.\.\., 5, got \[1\.0\]"),
        ({"severities": [True]}, r"whole numbers 1, \.\.\., 5, got \[True\]"),
        ({"severities": 3}, r"whole numbers 1, \.\.\., 5, got 3"),
        ({"severities": [2, 1, 2]}, "each of the severities once, got 2"),
        ({"corruptions": ["fog", "contrast", "fog"]}, "each of the corruptions once, got 'fog'"),
        ({"corruptions": "fog"}, r"several names, got 'fog'; give for example \['fog'\]"),
        ({"corruptions": [["fog"]]}, "several names"),
        ({"constants": "mnist-c", "corruptions": ()}, "constants among .*'mnist-c'"),
        ({"constants": "cifar-c", "sources": "cifar10-c:here"}, "generated corruptions only"),
        ({"names": ("images", "b")}, "'images'"),
        ({"names": ("a", "1")}, "'1'"),
        ({"names": ("errors/errors", "b")}, "'errors/errors'"),
        ({"names": ("a", 2)}, "two different names"),
        ({"shifts": {"clean": images(1)}}, "names of shifts .*'clean'"),
        ({"shifts": {"contrast": images(1)}}, "names of shifts .*'contrast'"),
        ({"shifts": {"contrast*": images(1)}}, "names of shifts"),
        ({"shifts": {"digital": images(1)}}, "names of shifts"),
        ({"shifts": {"all corruptions": images(1)}}, "names of shifts"),
        ({"shifts": {"": images(1)}}, "names of shifts"),
        ({"seed": -1}, "seed"),
        ({"names": ("a", "a")}, "two different names"),
        ({"shifts": {"short": images(count=N - 1)}}, "short to be versions of the 9 images"),
        ({"data": images(count=1)}, "at least two images"),
        ({"batch_size": 0}, "batch size"),
        ({"data": from_arrays(np.zeros((3, 4)), [0, 1, 1])}, "pixels only"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    given = {"model": network(0), "data": images(), "preprocess": scaled, "severities": [1]}
    given["corruptions"] = ["contrast"]
    with pytest.raises(FlexureError, match=message):
        flexure.corruption_accuracy(**(given | change))


def test_reports_progress() -> None:
    told: list[tuple[str, int, int]] = []
    flexure.corruption_accuracy(
        network(0), images(), preprocess=scaled, corruptions=["contrast"], severities=[1, 2],
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert told == [("corruptions", done, 3) for done in (1, 2, 3)]


def test_jpeg_twins_of_real_images(real_data: Path) -> None:
    """The shift at hand: JPEG costs the plain ResNet-20 points, and lower beta more of them."""
    clean = np.load(real_data / "cifar10-lossless/test846.npz")
    jpeg = np.load(real_data / "cifar10-jpeg/test.npz")
    rows = clean["index_in_jpeg_test"][:200]
    data = from_arrays(clean["images"][:200], clean["labels"][:200])
    twins = from_arrays(jpeg["images"][rows], jpeg["labels"][rows])
    loaded = flexure.load_model(
        f"flexure:resnet20?weights={real_data / 'resnet-cifar10/resnet20.safetensors'}"
    )
    steered = copy.deepcopy(loaded.model)
    flexure.steer(steered, beta=0.6, example=loaded.preprocess(data[0])[None])
    found = flexure.corruption_accuracy(
        steered, data, preprocess=loaded.preprocess, reference=loaded.model, corruptions=(),
        shifts={"JPEG": twins},
    )  # fmt: skip
    (shift,) = found.shifts
    assert found.clean.reference_accuracy.value > 0.87
    assert shift.reference_accuracy.value < found.clean.reference_accuracy.value - 0.04
    assert shift.difference.value < found.clean.difference.value
