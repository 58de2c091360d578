"""The official files of corrupted images: which images an address gives, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flexure.contracts import AddressError, DataError
from flexure.data import load_data
from flexure.data.corrupted_files import official_files

EACH = 10


def write_cifar_c(folder: Path, *names: str) -> dict[str, np.ndarray]:
    """Five severities of ten images, in the real format."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    written = {name: rng.integers(0, 256, (5 * EACH, 32, 32, 3), dtype=np.uint8) for name in names}
    for name, images in written.items():
        np.save(folder / f"{name}.npy", images)
    np.save(folder / "labels.npy", np.tile(np.arange(EACH, dtype=np.uint8)[::-1], 5))
    return written


@pytest.mark.parametrize("severity", [1, 4, 5])
def test_a_severity_is_its_part_of_the_file(severity: int, tmp_path: Path) -> None:
    images = write_cifar_c(tmp_path, "fog", "frost")["frost"]
    data = load_data(f"cifar10-c:{tmp_path}?corruption=frost&severity={severity}")["train"]
    assert len(data) == EACH
    assert data.labels.tolist() == list(range(EACH))[::-1]
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    for i in (0, 3, EACH - 1):
        expected = images[(severity - 1) * EACH + i].transpose(2, 0, 1)
        assert np.array_equal(data[i].numpy(), expected)


def test_images_are_mapped_and_not_written(tmp_path: Path) -> None:
    images = write_cifar_c(tmp_path, "fog")["fog"]
    data = load_data(f"cifar10-c:{tmp_path}?corruption=fog&severity=1")["train"]
    data[0].zero_()
    assert np.array_equal(np.load(tmp_path / "fog.npy"), images)
    assert np.array_equal(data[0].numpy(), images[0].transpose(2, 0, 1))


def test_a_hundred_classes_in_their_order(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, "fog")
    classes = load_data(f"cifar100-c:{tmp_path}?corruption=fog&severity=1")["train"].classes
    assert len(set(classes)) == 100
    assert list(classes) == sorted(classes)


@pytest.mark.parametrize(
    "query", ["", "?corruption=fog", "?severity=2", "?corruption=fog&severity=0"]
)
@pytest.mark.parametrize("prefix", ["cifar10-c", "imagenet-c"])
def test_corruption_and_severity_are_asked_for(prefix: str, query: str, tmp_path: Path) -> None:
    write_cifar_c(tmp_path, "fog")
    with pytest.raises(AddressError, match="corruption=NAME&severity=1"):
        load_data(f"{prefix}:{tmp_path}{query}")


def test_missing_corruption_names_those_that_are_there(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, "fog", "snow")
    with pytest.raises(AddressError, match=r"rain\.npy .*got fog, snow;"):
        load_data(f"cifar10-c:{tmp_path}?corruption=rain&severity=1")
    (tmp_path / "imagenet" / "fog" / "1").mkdir(parents=True)
    with pytest.raises(AddressError, match=r"folder rain .*got fog;"):
        load_data(f"imagenet-c:{tmp_path / 'imagenet'}?corruption=rain&severity=1")


@pytest.mark.parametrize("prefix", ["cifar10-c", "cifar100-c", "imagenet-c"])
@pytest.mark.parametrize("name", ["../other/fog", "..", ".", "sub/fog", "sub%5Cfog", "%2Ffog"])
def test_corruptions_are_names_not_paths(prefix: str, name: str, tmp_path: Path) -> None:
    for folder in ("c", "other"):
        write_cifar_c(tmp_path / folder, "fog")
    with pytest.raises(AddressError, match="without a path"):
        load_data(f"{prefix}:{tmp_path / 'c'}?corruption={name}&severity=1")


def test_the_files_of_an_address(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, "fog")
    cifar = official_files(f"cifar10-c:{tmp_path}?corruption=fog&severity=2")
    assert cifar == (tmp_path / "fog.npy", tmp_path / "labels.npy")
    (tmp_path / "fog" / "2" / "n01").mkdir(parents=True)
    image = tmp_path / "fog" / "2" / "n01" / "a.JPEG"
    image.write_bytes(b"")
    assert official_files(f"imagenet-c:{tmp_path}?corruption=fog&severity=2") == (image,)
    assert official_files("sklearn:digits") == ()


def test_missing_labels(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, "fog")
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(AddressError, match="labels"):
        load_data(f"cifar10-c:{tmp_path}?corruption=fog&severity=1")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("fog", np.zeros((49, 32, 32, 3), np.uint8), "49 images and 50 labels"),
        ("labels", np.zeros(40, np.uint8), "50 images and 40 labels"),
        ("fog", np.zeros((50, 32, 32, 3)), "uint8 .*float64"),
        ("fog", np.zeros((50, 3, 32, 32), np.uint8), "shape"),
        ("labels", np.full(50, 10, np.uint8), "labels in 0 ... 9"),
        ("labels", np.zeros(50), "integer label"),
        ("labels", np.arange(50, dtype=np.uint8) // 5, "same labels for each of five severities"),
        ("fog", np.array([{}], dtype=object), "plain array"),
    ],
)
def test_wrong_files(name: str, array: np.ndarray, message: str, tmp_path: Path) -> None:
    write_cifar_c(tmp_path, "fog")
    np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        load_data(f"cifar10-c:{tmp_path}?corruption=fog&severity=1")


def test_length_that_five_does_not_divide(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, "fog")
    np.save(tmp_path / "fog.npy", np.zeros((48, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(48, np.uint8))
    with pytest.raises(DataError, match="five severities"):
        load_data(f"cifar10-c:{tmp_path}?corruption=fog&severity=1")


def test_a_cut_file(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, "fog")
    content = (tmp_path / "fog.npy").read_bytes()
    (tmp_path / "fog.npy").write_bytes(content[:-1000])
    with pytest.raises(DataError, match="download it again"):
        load_data(f"cifar10-c:{tmp_path}?corruption=fog&severity=1")


class _Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar_c(tmp_path, "fog")
    (tmp_path / "fog.npy").write_bytes(pickle.dumps(_Trap()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        load_data(f"cifar10-c:{tmp_path}?corruption=fog&severity=1")
    assert not (tmp_path / "sprung").exists()


def test_imagenet_c(tmp_path: Path) -> None:
    for severity in (1, 2):
        for number, wnid in enumerate(("n02", "n01")):
            folder = tmp_path / "snow" / str(severity) / wnid
            folder.mkdir(parents=True)
            for i in range(2):
                level = 100 * number + 10 * severity + i
                Image.new("RGB", (8, 6), (level,) * 3).save(folder / f"{i}.JPEG", quality=95)
    data = load_data(f"imagenet-c:{tmp_path}?corruption=snow&severity=2")["train"]
    assert data.classes == ("n01", "n02")
    assert data.labels.tolist() == [0, 0, 1, 1]
    levels = torch.stack([data[i] for i in range(4)]).double().mean((1, 2, 3))
    torch.testing.assert_close(
        levels, torch.tensor([120.0, 121, 20, 21], dtype=torch.float64), atol=1.5, rtol=0
    )
