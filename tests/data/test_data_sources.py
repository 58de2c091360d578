"""Every row of the catalogue of data sources, and what each source refuses."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from flexure.contracts import AddressError, DataError, LabelledData, MissingExtraError
from flexure.data import CATALOGUE, ArrayData, LazyData, from_arrays, load_data


@dataclass(frozen=True)
class Made:
    """A small source of two classes, and what must come out of it."""

    address: str
    splits: dict[str, int]
    shape: tuple[int, ...]


def grey(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 5, 7), dtype=np.uint8), np.arange(count) % 2


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_folder(root: Path, classes: dict[str, int], *, size: tuple[int, int] = (7, 5)) -> None:
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (10 * number, i, 200)).save(root / name / f"{i}.png")


def make_sklearn(folder: Path) -> Made:
    return Made("sklearn:digits", {"train": 1797}, (1, 8, 8))


def make_npz(folder: Path) -> Made:
    x, y = grey(6)
    np.savez(folder / "d.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    return Made(f"npz:{folder / 'd.npz'}", {"train": 6, "test": 4}, (1, 5, 7))


def make_idx(folder: Path) -> Made:
    for stem, count in (("train", 6), ("t10k", 4)):
        x, y = grey(count)
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", x)
        write_idx(folder / f"{stem}-labels-idx1-ubyte", y)
    return Made(f"idx:{folder}", {"train": 6, "test": 4}, (1, 5, 7))


def make_folder(folder: Path) -> Made:
    for split, count in (("train", 3), ("val", 2)):
        write_folder(folder / split, {"cat": count, "dog": count})
    return Made(f"folder:{folder}", {"train": 6, "validation": 4}, (3, 5, 7))


def make_hub(folder: Path) -> Made:
    for split, count in (("train", 3), ("test", 2)):
        write_folder(folder / split, {"cat": count, "dog": count})
    return Made(f"hf:{folder}", {"train": 6, "test": 4}, (3, 5, 7))


def make_cifar_c(folder: Path, *, classes: int) -> Made:
    images, _ = grey(5 * classes)
    np.save(folder / "fog.npy", np.repeat(images[..., None], 3, axis=3))
    np.save(folder / "labels.npy", np.tile(np.arange(classes, dtype=np.uint8), 5))
    prefix = f"cifar{classes}-c"
    return Made(f"{prefix}:{folder}?corruption=fog&severity=3", {"train": classes}, (3, 5, 7))


def make_imagenet_c(folder: Path) -> Made:
    write_folder(folder / "fog" / "3", {"n01440764": 3, "n01443537": 3})
    return Made(f"imagenet-c:{folder}?corruption=fog&severity=3", {"train": 6}, (3, 5, 7))


MAKERS: dict[str, Callable[[Path], Made]] = {
    "sklearn": make_sklearn,
    "npz": make_npz,
    "idx": make_idx,
    "folder": make_folder,
    "hf": make_hub,
    "cifar10-c": partial(make_cifar_c, classes=10),
    "cifar100-c": partial(make_cifar_c, classes=100),
    "imagenet-c": make_imagenet_c,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def test_every_row_is_tested() -> None:
    assert set(MAKERS) == set(CATALOGUE)


@pytest.mark.parametrize("prefix", CATALOGUE)
def test_source_keeps_the_contract(prefix: str, tmp_path: Path) -> None:
    made = MAKERS[prefix](tmp_path)
    loaded = load_data(made.address)
    assert {name: len(data) for name, data in loaded.items()} == made.splits
    for data in loaded.values():
        assert isinstance(data, LabelledData)
        assert data.classes == loaded["train"].classes
        assert data.labels.dtype == torch.int64
        assert set(data.labels.tolist()) == set(range(len(data.classes)))
        assert data[0].shape == made.shape
        assert data[0].dtype == torch.uint8
        assert torch.equal(data[-1], data[len(data) - 1])
        with pytest.raises(IndexError):
            data[len(data)]


@pytest.mark.parametrize("prefix", CATALOGUE)
def test_source_is_deterministic_and_pickles(prefix: str, tmp_path: Path) -> None:
    made = MAKERS[prefix](tmp_path)
    first, second = load_data(made.address)["train"], load_data(made.address)["train"]
    copy = pickle.loads(pickle.dumps(first))
    for other in (second, copy):
        assert torch.equal(first.labels, other.labels)
        assert all(torch.equal(first[i], other[i]) for i in range(4))


@pytest.mark.parametrize("prefix", [p for p in CATALOGUE if p != "hf"])
def test_missing_source(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(AddressError, match="expected"):
        load_data(f"{prefix}:{tmp_path / 'absent'}")


def test_unknown_prefix_lists_all_rows() -> None:
    with pytest.raises(AddressError) as caught:
        load_data("csv:file")
    assert all(f"{prefix}:" in str(caught.value) for prefix in CATALOGUE)


# sklearn


def test_digits_grey_levels_are_stated_exactly() -> None:
    data = load_data("sklearn:digits")["train"]
    raw = load_digits().images
    levels = torch.tensor([round(255 * v / 16) for v in range(17)], dtype=torch.uint8)
    expected = levels[torch.from_numpy(raw).long()]
    assert torch.equal(torch.stack([data[i] for i in range(len(data))])[:, 0], expected)
    assert data.classes == tuple("0123456789")


@pytest.mark.parametrize(("name", "dims"), [("wine", 13), ("breast_cancer", 30), ("iris", 4)])
def test_vector_sets(name: str, dims: int) -> None:
    data = load_data(f"sklearn:{name}")["train"]
    assert data[0].shape == (dims,)
    assert data[0].dtype == torch.float32


# npz


@pytest.mark.parametrize(
    "shape", [(4, 5, 7), (4, 5, 7, 1), (4, 5, 7, 3), (4, 1, 5, 7), (4, 3, 5, 7)]
)
def test_image_layouts(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=x, labels=np.arange(4) % 2)
    data = load_data(f"npz:{tmp_path / 'd.npz'}")["train"]
    x = x[:, None] if x.ndim == 3 else x
    expected = x if x.shape[1] in (1, 3) else x.transpose(0, 3, 1, 2)
    assert torch.equal(data[2], torch.from_numpy(expected[2].copy()))
    assert data.classes == ("0", "1")


@pytest.mark.parametrize("pattern", ["{base}_{split}", "{split}_{base}"])
def test_npz_splits_in_names(pattern: str, tmp_path: Path) -> None:
    arrays = {}
    for i, split in enumerate(("train", "val", "test")):
        x, y = grey(4 + i)
        arrays[pattern.format(base="images", split=split)] = x
        # MedMNIST keeps labels as a column.
        arrays[pattern.format(base="labels", split=split)] = y[:, None]
    np.savez(tmp_path / "d.npz", **arrays)
    loaded = load_data(f"npz:{tmp_path / 'd.npz'}")
    assert {k: len(v) for k, v in loaded.items()} == {"train": 4, "validation": 5, "test": 6}


def test_npz_vectors_and_class_names(tmp_path: Path) -> None:
    x = np.arange(12.0).reshape(4, 3)
    np.savez(tmp_path / "d.npz", x=x, y=np.array([0, 1, 0, 1]), classes=np.array(["no", "yes"]))
    data = load_data(f"npz:{tmp_path / 'd.npz'}")["train"]
    assert data.classes == ("no", "yes")
    assert torch.equal(data[1], torch.tensor([3.0, 4.0, 5.0]))


def jpeg_arrays(count: int = 4) -> dict[str, np.ndarray]:
    files = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 8), (60 * i, 0, 0)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0] + [len(f) for f in files]),
        "labels": np.arange(count) % 2,
    }


def test_npz_of_jpeg_bytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **jpeg_arrays())
    data = load_data(f"npz:{tmp_path / 'd.npz'}")["train"]
    assert data[3].shape == (3, 8, 16)
    assert abs(int(data[3][0, 4, 4]) - 180) <= 2


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": np.array([0, 1])},
        {"offsets": np.array([0, 5, 4, 9, 10])},
        {"offsets": np.array([0.0, 1, 2, 3, 4])},
        {"offsets": np.array([0, 5, 4, 9, len(jpeg_arrays()["jpeg"])], dtype=np.uint64)},
        {"offsets": np.array([1, 5, 8, 9, len(jpeg_arrays()["jpeg"])])},
        {"offsets": np.array([0, 5, 8, 9, len(jpeg_arrays()["jpeg"]) + 1])},
        {"labels": np.arange(3)},
    ],
)
def test_npz_of_jpeg_bytes_with_wrong_offsets(change, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **(jpeg_arrays() | change))
    with pytest.raises(DataError, match="offsets"):
        load_data(f"npz:{tmp_path / 'd.npz'}")


def test_damaged_jpeg_names_the_image(tmp_path: Path) -> None:
    arrays = jpeg_arrays()
    content = arrays["jpeg"].copy()
    content[arrays["offsets"][2] : arrays["offsets"][3]] = 0
    np.savez(tmp_path / "d.npz", **(arrays | {"jpeg": content}))
    data = load_data(f"npz:{tmp_path / 'd.npz'}")["train"]
    data[1]
    with pytest.raises(DataError, match=r"image 2 of .*d\.npz"):
        data[2]


X, Y = grey(4)
BAD_NPZ = {
    "no arrays": ({"a": X}, "rename"),
    "no labels": ({"x": X}, "one of labels"),
    "two pairs": ({"x": X, "images": X, "y": Y}, "keep one pair"),
    "training twice": ({"x": X, "x_train": X, "y": Y}, "keep one pair"),
    "only a test split": ({"x_test": X, "y_test": Y}, "for training"),
    "counts differ": ({"x": X, "y": Y[:3]}, "3 labels for 4 samples"),
    "empty": ({"x": X[:0], "y": Y[:0]}, "got none"),
    "empty test": ({"x": X, "y": Y, "x_test": X[:0], "y_test": Y[:0]}, "test: .*got none"),
    "one class": ({"x": X, "y": Y * 0}, "at least two classes"),
    "negative label": ({"x": X, "y": Y - 1}, "from -1 to 0"),
    "huge label": ({"x": X, "y": Y * 10**9}, "1000000000"),
    "label without a name": ({"x": X, "y": Y, "classes": np.array(["a"])}, "from 0 to 1"),
    "name without a list": ({"x": X, "y": Y, "classes": np.array("a")}, r"shape \(\)"),
    "names in a table": ({"x": X, "y": Y, "classes": np.array([["a"], ["b"]])}, r"shape \(2, 1\)"),
    "equal names": ({"x": X, "y": Y, "classes": np.array(["a", "a"])}, "2 classes called 'a'"),
    "float labels": ({"x": X, "y": Y * 1.0}, "float64"),
    "one-hot labels": ({"x": X, "y": np.eye(4, dtype=int)}, r"\(4, 4\)"),
    "float images": ({"x": X / 255, "y": Y}, "uint8"),
    "four channels": ({"x": np.zeros((4, 5, 7, 4), np.uint8), "y": Y}, "neither"),
    "ambiguous": ({"x": np.zeros((4, 3, 5, 3), np.uint8), "y": Y}, "both"),
    "nan": ({"x": np.full((4, 2), np.nan), "y": Y}, "finite"),
    "text": ({"x": np.array([["a"]] * 4), "y": Y}, "uint8"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_npz_refuses(case: str, tmp_path: Path) -> None:
    arrays, message = BAD_NPZ[case]
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data(f"npz:{tmp_path / 'd.npz'}")


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_content_is_refused_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    objects = np.array([Bomb(mark)] * 2, dtype=object)
    np.savez(tmp_path / "inside.npz", x=objects, y=np.arange(2))
    (tmp_path / "whole.npz").write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("inside", "whole"):
        with pytest.raises(DataError, match="pickled"):
            load_data(f"npz:{tmp_path / name}.npz")
    assert not mark.exists()


@pytest.mark.parametrize("damage", ["text", "cut", "flipped", "npy", "empty"])
def test_damaged_npz(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=X, y=Y)
    content = path.read_bytes()
    if damage == "npy":
        np.save(tmp_path / "d.npy", X)
        path.write_bytes((tmp_path / "d.npy").read_bytes())
    else:
        middle = content[:80] + bytes(b ^ 255 for b in content[80:90]) + content[90:]
        path.write_bytes(
            {"text": b"hello", "cut": content[:-30], "flipped": middle, "empty": b""}[damage]
        )
    with pytest.raises(DataError, match=r"numpy\.savez"):
        load_data(f"npz:{path}")


def test_rows_of_another_file(tmp_path: Path) -> None:
    x, y = grey(6)
    np.savez(tmp_path / "d.npz", images=x, labels=y)
    rows = np.array([4, 1, 5])
    np.savez(tmp_path / "other.npz", images=x[:3], labels=y[:3], place=rows)
    address = f"npz:{tmp_path / 'd.npz'}?rows={tmp_path / 'other.npz'}:"
    data = load_data(f"{address}place")["train"]
    assert data.labels.tolist() == y[rows].tolist()
    assert [data[i][0].tolist() for i in range(3)] == x[rows].tolist()
    with pytest.raises(DataError, match=r"'absent' in .*got none"):
        load_data(f"{address}absent")
    with pytest.raises(DataError, match="row numbers 'images'"):
        load_data(f"{address}images")
    with pytest.raises(AddressError, match="rows="):
        load_data(f"npz:{tmp_path / 'd.npz'}?order=1")
    np.savez(tmp_path / "other.npz", place=np.array([0, 6]))
    with pytest.raises(DataError, match=r"from 0 to 5 .*got 0 to 6"):
        load_data(f"{address}place")


# idx


def test_idx_values_and_lone_test_pair(tmp_path: Path) -> None:
    x, y = grey(6)
    write_idx(tmp_path / "t10k-images.idx3-ubyte", x)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", y)
    loaded = load_data(f"idx:{tmp_path}")
    assert list(loaded) == ["train"]
    assert torch.equal(loaded["train"][4], torch.from_numpy(x[4:5]))
    assert loaded["train"].labels.tolist() == y.tolist()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("images", b"", "header"),
        ("images", b"\x00\x00\x0d\x03" + bytes(12), "header"),
        ("images", b"\x00\x00\x08\x01" + bytes(12), "header"),
        ("images", b"\x00\x00\x08\x03" + struct.pack(">3I", 6, 5, 7) + bytes(209), "210 values"),
        ("images", b"\x00\x00\x08\x03" + struct.pack(">3I", 6, 5, 7) + bytes(211), "210 values"),
        ("images", b"\x00\x00\x08\x03" + struct.pack(">3I", 5, 5, 7) + bytes(175), "6 labels for"),
    ],
)
def test_damaged_idx(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    x, y = grey(6)
    write_idx(tmp_path / "train-images-idx3-ubyte", x)
    write_idx(tmp_path / "train-labels-idx1-ubyte", y)
    (tmp_path / f"train-{file}-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(f"idx:{tmp_path}")


def test_idx_with_a_broken_archive_or_half_a_pair(tmp_path: Path) -> None:
    x, y = grey(6)
    write_idx(tmp_path / "train-images-idx3-ubyte", x)
    with pytest.raises(DataError, match="only one of them"):
        load_data(f"idx:{tmp_path}")
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    write_idx(path, y)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match="download it again"):
        load_data(f"idx:{tmp_path}")


def test_mnist(real_data: Path) -> None:
    data = load_data(f"idx:{real_data / 'mnist-t10k'}")["train"]
    assert len(data) == 10_000
    assert data[0].shape == (1, 28, 28)
    # The class counts of t10k, as published.
    assert data.labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


# folder


def test_folder_without_splits_and_nested_images(tmp_path: Path) -> None:
    write_folder(tmp_path, {"b": 2, "a": 1})
    (tmp_path / "a" / "more").mkdir()
    Image.new("L", (4, 3), 77).save(tmp_path / "a" / "more" / "x.JPG")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    data = load_data(f"folder:{tmp_path}")["train"]
    assert data.classes == ("a", "b")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data[1].shape == (3, 3, 4)
    assert int(data[1].float().mean().round()) == 77


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_folder(tmp_path, {"car": 2, "train": 2})
    write_folder(tmp_path / "train", {"steam": 1})
    assert load_data(f"folder:{tmp_path}")["train"].classes == ("car", "train")


def test_folder_values_and_orientation(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 1})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a" / "0.png", exif=exif)
    data = load_data(f"folder:{tmp_path}")["train"]
    assert np.array_equal(data[0].permute(1, 2, 0).numpy(), pixels[::-1, ::-1])


def test_folder_decodes_only_when_asked(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    data = load_data(f"folder:{tmp_path}")["train"]
    data[0]
    with pytest.raises(DataError, match=r"a.1\.png"):
        data[1]


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 1})
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a" / "0.png")
    with pytest.raises(DataError, match="8 bits"):
        load_data(f"folder:{tmp_path}")["train"][0]


def test_folder_refuses(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no folder"):
        load_data(f"folder:{tmp_path / 'empty'}")
    write_folder(tmp_path / "one", {"a": 3})
    with pytest.raises(DataError, match="at least two classes"):
        load_data(f"folder:{tmp_path / 'one'}")
    (tmp_path / "one" / "b").mkdir()
    with pytest.raises(DataError, match=r"expected images in .*b, got none"):
        load_data(f"folder:{tmp_path / 'one'}")
    write_folder(tmp_path / "new" / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "new" / "test", {"a": 1, "c": 1})
    with pytest.raises(DataError, match="new classes c"):
        load_data(f"folder:{tmp_path / 'new'}")
    write_folder(tmp_path / "new" / "val", {"a": 1})
    write_folder(tmp_path / "new" / "valid", {"a": 1})
    with pytest.raises(DataError, match="keep one"):
        load_data(f"folder:{tmp_path / 'new'}")


# hf


def dataset(labels: list, *, feature=None, **columns):
    import datasets

    images = [Image.new("RGB", (7, 5), (i, 0, 0)) for i in range(len(labels))]
    features = {"img": datasets.Image(), "label": feature or datasets.ClassLabel(names=["n", "p"])}
    features |= dict.fromkeys(columns, datasets.ClassLabel(names=["u", "v"]))
    return datasets.Dataset.from_dict(
        {"img": images, "label": labels, **columns}, features=datasets.Features(features)
    )


def test_hub_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    parts = {"train": dataset([0, 1, 1]), "valid": dataset([1, 0]), "test": dataset([-1, -1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    with pytest.warns(UserWarning, match="'test' has no labels"):
        loaded = load_data(f"hf:{tmp_path / 'd'}")
    assert list(loaded) == ["train", "validation"]
    assert loaded["train"].classes == ("n", "p")
    assert loaded["train"].labels.tolist() == [0, 1, 1]
    assert loaded["train"][2][:, 0, 0].tolist() == [2, 0, 0]


def test_hub_parquet_with_text_labels_and_config(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "d").mkdir()
    dataset(["x", "y", "x"], feature=datasets.Value("string")).to_parquet(
        tmp_path / "d" / "train.parquet"
    )
    data = load_data(f"hf:{tmp_path / 'd'}")["train"]
    assert data.classes == ("x", "y")
    assert data.labels.tolist() == [0, 1, 0]


def test_hub_integer_labels_without_names(tmp_path: Path) -> None:
    import datasets

    dataset([0, 2, 1], feature=datasets.Value("int32")).save_to_disk(tmp_path / "d")
    data = load_data(f"hf:{tmp_path / 'd'}")["train"]
    assert data.classes == ("0", "1", "2")
    assert data.labels.tolist() == [0, 2, 1]


def test_hub_column_is_chosen_in_the_address(tmp_path: Path) -> None:
    dataset([0, 1, 1], coarse=[1, 0, 1]).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"\?label=COLUMN"):
        load_data(f"hf:{tmp_path / 'd'}")
    data = load_data(f"hf:{tmp_path / 'd'}?label=coarse")["train"]
    assert data.classes == ("u", "v")
    assert data.labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"\?image=COLUMN"):
        load_data(f"hf:{tmp_path / 'd'}?label=coarse&image=absent")


def test_hub_refuses(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"a": [1.0, 2.0]}).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="one image column"):
        load_data(f"hf:{tmp_path / 'none'}")
    dataset([0, None, 1]).save_to_disk(tmp_path / "gap")
    with pytest.raises(DataError, match="label in every row"):
        load_data(f"hf:{tmp_path / 'gap'}")
    two = {"a": dataset([0, 1]), "b": dataset([0, 1])}
    datasets.DatasetDict(two).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="split named train"):
        load_data(f"hf:{tmp_path / 'two'}")


def test_hub_name_and_config_are_passed_on(monkeypatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None):
        asked.append((name, config))
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for address in ("hf:beans", "hf:user/set:small"):
        with pytest.raises(AddressError, match="no route; check the name"):
            load_data(address)
    assert asked == [("beans", None), ("user/set", "small")]


def test_hub_without_the_library(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'flexure\[hf\]'"):
        load_data("hf:beans")


# classes of data


def test_counts_and_label_types_are_checked() -> None:
    items = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(DataError, match="2 labels for 3"):
        ArrayData(items, torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(DataError, match="int64"):
        ArrayData(items, torch.tensor([0.0, 1.0, 0.0]), ("a", "b"))
    with pytest.raises(IndexError):
        LazyData(lambda i: items[i], torch.tensor([0, 1, 0]), ("a", "b"))[-4]


def test_from_arrays_copies() -> None:
    x, y = grey(4)
    data = from_arrays(x, y)
    before = data[0].clone()
    x[:] = 0
    assert torch.equal(data[0], before)
