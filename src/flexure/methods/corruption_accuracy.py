"""Accuracy on corrupted images: common corruptions, generated or official, and given shifts.

What a corruption does is the business of `data/corruptions`; means, intervals and tables are in
`corruption_accuracy_result.py`, and which settings fit in `corruption_accuracy_checks.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor, nn

from flexure.calling import check_logits, evaluating, logits_of, unwritten
from flexure.contracts import DataError, LabelledData
from flexure.data.batches import Subset, batches
from flexure.data.corrupted_files import official_files
from flexure.data.corruptions import CORRUPTIONS, SEVERITIES, Corrupted
from flexure.data.sources import load_data
from flexure.fingerprints import content, described, fingerprint
from flexure.methods.corruption_accuracy_checks import (
    check_chosen,
    check_images,
    check_names,
    check_sources,
)
from flexure.methods.corruption_accuracy_result import CorruptedCell, CorruptionAccuracy
from flexure.methods.features import device_of
from flexure.processes import Processes, current_processes
from flexure.progress import Progress, ProgressReporter
from flexure.record import versions
from flexure.store import Store

__all__ = ["corruption_accuracy"]

_FIRST = 4
"""Of so many images the preprocessed ones tell which preprocessing it is: what it reads from
elsewhere is not in its description."""

_SAMPLED = 64
"""Of so many images of official files the content tells them apart, beside sizes and times of the
files: decoding all of them takes as long as answering."""

_MAKERS = ("numpy", "scipy", "pillow")
"""Packages that generated corruptions, and decoded images, depend on."""


def corruption_accuracy(
    model: nn.Module,
    data: LabelledData,
    *,
    preprocess: Callable[[Tensor], Tensor],
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 42,
    reference: nn.Module | None = None,
    names: tuple[str, str] = ("model", "reference"),
    sources: str | None = None,
    shifts: Mapping[str, LabelledData] | None = None,
    constants: str | None = None,
    batch_size: int = 128,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> CorruptionAccuracy:
    """The accuracy of a classifier on corrupted versions of images, beside that on clean ones.

    Both models see the same corrupted images, so that they are compared image by image. Images are
    corrupted before they are preprocessed. The models are not changed.

    Args:
        model: a classifier of preprocessed images.
        data: clean images, `(C, H, W)` uint8, with labels.
        preprocess: one image -> one model input, without the batch dimension.
        corruptions: names; None: all fifteen of `flexure.data.CORRUPTIONS`; (): none.
        severities: some of 1 ... 5, each once; likewise the corruptions.
        seed: of what is random in generated corruptions.
        reference: another classifier of the same images and classes, such as the unsteered network.
        names: what to call the two; not as another column of the table.
        sources: address of official files without options, such as `"cifar10-c:FOLDER"`, to read
            corrupted images from; their first N images must be those of `data`. None: generate.
        shifts: name -> other versions of all of the images, in the same order; no corruption's.
        constants: see `flexure.data.corrupt`; for generated ones only.
        batch_size: images at a time.
        resume: folder of finished corruptions; the same evaluation continues from it, and more
            corruptions, severities or shifts may be asked for. What was read from official files
            that have changed since is counted anew.
        progress: True for a bar on stderr, or a callable (stage, done, total).

    Returns:
        Printable; `.clean`, `.cells`, `.shifts`, `.mean`, `.over(name)`, `.at(severity)`,
        `.rows()`, `.to_dict()`.

    Raises:
        DataError: fewer than two images, an unknown corruption, or versions of other images.
        AddressError: official files that are not there.
        FlexureError: settings or models that do not fit.

    Example:
        >>> import torch
        >>> from flexure.data import from_arrays
        >>> images = torch.arange(4 * 64).reshape(4, 8, 8).to(torch.uint8).numpy()
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
        >>> found = corruption_accuracy(
        ...     network, from_arrays(images, [0, 1, 0, 1]), preprocess=lambda x: x / 255,
        ...     corruptions=["contrast"], severities=[1, 5],
        ... )
        >>> [(cell.name, cell.severity, len(cell.right)) for cell in found.cells]
        [('contrast', 1, 4), ('contrast', 5, 4)]
    """
    check_images(data)
    check_chosen(corruptions, severities, seed)
    check_sources(sources, constants)
    chosen = tuple(CORRUPTIONS if corruptions is None else corruptions)
    check_names(names, shifts or {}, chosen, severities)
    wanted = _Wanted(data, chosen, tuple(severities), seed, sources, constants)
    all_versions = [
        _Version("clean", "clean", None, data),
        *(_Version(k, "shift", None, _same(each, data, k)) for k, each in (shifts or {}).items()),
        *wanted.versions(),
    ]
    models = [model] if reference is None else [model, reference]
    processes = current_processes()
    store = None
    if resume is not None and processes.is_first:
        store = _store(resume, model, reference, preprocess, wanted)
    count = _Count(models, preprocess, batch_size, processes, store)
    reporter = ProgressReporter(progress if processes.is_first else None)
    cells = []
    try:
        for done, version in enumerate(all_versions):
            cells.append(count(version))
            reporter("corruptions", done + 1, len(all_versions))
    finally:
        reporter.close()
    return CorruptionAccuracy(
        cells[0],
        tuple(cell for cell in cells if cell.severity is not None),
        tuple(cell for cell in cells if cell.group == "shift"),
        names,
        sources,
        {
            "corruptions": list(chosen), "severities": list(severities), "seed": seed,
            "constants": constants, "shifts": list(shifts or ()), "batch_size": batch_size,
        },
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Version:
    """One version of the images; what is said of it is `CorruptedCell`'s.

    Attributes:
        address: of official files; None: of generated, clean or given images.
    """

    name: str
    group: str
    severity: int | None
    data: LabelledData
    substitute: str | None = None
    address: str | None = None


@dataclass(frozen=True, eq=False)
class _Wanted:
    """Which corrupted versions, and where from; see `corruption_accuracy`."""

    data: LabelledData
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    seed: int
    sources: str | None
    constants: str | None

    def versions(self) -> list[_Version]:
        """One a corruption and severity, in this order; nothing is corrupted or decoded yet."""
        return [self._version(name, s) for name in self.corruptions for s in self.severities]

    def _version(self, name: str, severity: int) -> _Version:
        if self.sources is None:
            made = Corrupted(self.data, name, severity, seed=self.seed, constants=self.constants)
            row = CORRUPTIONS[name]
            return _Version(name, row.group, severity, made, row.substitute)
        group = CORRUPTIONS[name].group if name in CORRUPTIONS else "extra"
        address = f"{self.sources}?corruption={name}&severity={severity}"
        official = load_data(address)["train"]
        if len(official) > len(self.data):
            official = Subset(official, torch.arange(len(self.data)))
        same = _same(official, self.data, address)
        return _Version(name, group, severity, same, address=address)


class _Count:
    """Counts right answers on one version after another, on all processes together."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        preprocess: Callable[[Tensor], Tensor],
        batch_size: int,
        processes: Processes,
        store: Store | None,
    ) -> None:
        self._models, self._preprocess, self._batch_size = models, preprocess, batch_size
        self._processes, self._store = processes, store

    def __call__(self, version: _Version) -> CorruptedCell:
        key = _key(version) if self._store is not None else ""
        there = None if self._store is None else self._store.get(key)
        stored = self._processes.gathered(there, "finished corruptions")[0]
        right = self._right(version) if stored is None else stored["right"]
        if stored is None and self._store is not None:
            self._store.put(key, {"right": right})
        both = [row.bool() for row in right]
        return CorruptedCell(
            version.name,
            version.group,
            version.severity,
            both[0],
            both[1] if len(both) > 1 else None,
            version.substitute,
        )

    def _right(self, version: _Version) -> Tensor:
        """(models, N) bool."""
        mine = self._processes.part(len(version.data))
        with self._processes.together():
            found = torch.cat(list(self._batches(version.data, mine)), 1)
        return torch.cat(self._processes.gathered(found, "right answers"), 1)

    def _batches(self, data: LabelledData, rows: slice) -> Iterator[Tensor]:
        """(models, B) bool each; none of them where there are no rows."""
        yield torch.zeros(len(self._models), 0, dtype=torch.bool)
        part = torch.arange(rows.start, rows.stop)
        if not len(part):
            return
        with ExitStack() as stack, torch.no_grad():
            for model in self._models:
                stack.enter_context(evaluating(model))
                stack.enter_context(unwritten(model))
            given = batches(
                Subset(data, part), preprocess=self._preprocess, batch_size=self._batch_size
            )
            for x, y in given:
                yield torch.stack([_answers(model, x, y) for model in self._models])


def _answers(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(B,) bool, right; not where the logits are not finite."""
    logits = check_logits(logits_of(model(x.to(device_of(model)))).cpu(), y)
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def _same(version: LabelledData, data: LabelledData, name: str) -> LabelledData:
    """`version`, once it has the labels of `data`.

    Raises:
        DataError: it has not.
    """
    if not torch.equal(version.labels, data.labels):
        raise DataError(
            f"expected {name} to be versions of the {len(data)} images, in their order, got "
            f"{len(version)} images with other labels; give the same images, clean and changed"
        )
    return version


def _store(
    folder: str | os.PathLike[str],
    model: nn.Module,
    reference: nn.Module | None,
    preprocess: Callable[[Tensor], Tensor],
    wanted: _Wanted,
) -> Store:
    """Where finished versions are kept; which versions there are is not part of its fingerprint."""
    library = versions()
    told = {
        "model": fingerprint(model),
        "reference": "none" if reference is None else fingerprint(reference),
        "images": _digest(wanted.data),
        "preprocessing": _preprocessing(preprocess, wanted.data),
        "seed": str(wanted.seed),
        "sources": str(wanted.sources),
        "constants": str(wanted.constants),
        "library": str(library["flexure"]),
        "torch": str(library["torch"]),
        **{package: _version_of(package) for package in _MAKERS},
    }
    return Store(folder, told, holds="corruptions", work="evaluation")


def _key(version: _Version) -> str:
    """A file name; of given images by their content, of official ones by their files too."""
    if version.severity is None:
        return f"{version.group}-{_digest(version.data)}"
    if version.address is None:
        return f"{version.name}-{version.severity}"
    stats = [(str(path), path.stat()) for path in official_files(version.address)]
    files = str([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    step = -(-len(version.data) // _SAMPLED)
    sampled = _digest(version.data, range(0, len(version.data), step), files)
    return f"{version.name}-{version.severity}-{sampled}"


def _digest(data: LabelledData, places: Iterable[int] | None = None, more: str = "") -> str:
    """Of all labels, of all images or of some, and of a text."""
    digest = hashlib.blake2b(content(data.labels), digest_size=16)
    digest.update(more.encode())
    for i in range(len(data)) if places is None else places:
        image = data[i]
        digest.update(str(tuple(image.shape)).encode())
        digest.update(content(image))
    return digest.hexdigest()


def _preprocessing(preprocess: Callable[[Tensor], Tensor], data: LabelledData) -> str:
    """Digest of its description and of what it makes of the first images."""
    digest = hashlib.blake2b(described(preprocess).encode(), digest_size=16)
    for i in range(min(len(data), _FIRST)):
        digest.update(described(preprocess(data[i])).encode())
    return digest.hexdigest()


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
