"""Pretrained models of other libraries: transformers, timm, torchvision, RobustBench.

Each library is imported when its address is used. Our own models and files are read by `sources`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexure.addresses import first_line, import_extra, split_options
from flexure.contracts import AddressError, LoadedModel
from flexure.models.preprocess import PilPreprocess, Preprocess, ProcessorPreprocess

__all__ = ["load_robustbench", "load_timm", "load_torchvision", "load_transformers"]


def load_transformers(rest: str) -> LoadedModel:
    """`hf:NAME_OR_DIR`: an image classifier of the transformers library, in float32.

    Only safetensors weights are read. The image processor is the PIL one in every environment, so
    that a result does not depend on whether torchvision is installed.

    Raises:
        MissingExtraError: transformers is not installed.
        AddressError: the model or its image processor cannot be loaded.
    """
    transformers = import_extra("transformers", install="pip install 'flexure[hf]'")
    modern = int(transformers.__version__.partition(".")[0]) >= 5
    backend: dict[str, Any] = {"backend": "pil"} if modern else {"use_fast": False}
    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(
            rest, use_safetensors=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(rest, **backend)
    except Exception as error:  # the library raises many unrelated types for a wrong name or file
        raise AddressError(
            f"expected an image classifier with safetensors weights and an image processor at "
            f"hf:{rest}, got: {first_line(error)}; check the name or folder, and the connection"
        ) from error
    return LoadedModel(model.float().eval(), ProcessorPreprocess(processor), f"hf:{rest}")


def load_timm(rest: str) -> LoadedModel:
    """`timm:NAME`: a pretrained model of timm with its evaluation transform.

    Raises:
        MissingExtraError: timm is not installed.
        AddressError: the model cannot be loaded.
    """
    timm = import_extra("timm", install="pip install 'flexure[timm]'")
    timm_data = import_extra("timm.data", install="pip install 'flexure[timm]'")
    try:
        model = timm.create_model(rest, pretrained=True)
        config = timm_data.resolve_model_data_config(model)
        transform = timm_data.create_transform(**config, is_training=False)
    except Exception as error:  # the library raises many unrelated types for a wrong name
        raise _not_loaded("timm", rest, error) from error
    head = _path_of(model, model.get_classifier())
    return LoadedModel(model.eval(), PilPreprocess(transform), f"timm:{rest}", head)


def load_torchvision(rest: str) -> LoadedModel:
    """`torchvision:NAME`: a classifier of torchvision with its default weights' transform.

    Raises:
        MissingExtraError: torchvision is not installed, or does not fit the installed torch.
        AddressError: the model cannot be loaded.
    """
    models = import_extra(
        "torchvision.models",
        install="pip install torchvision, from the same index as the installed torch",
    )
    try:
        weights = models.get_model_weights(rest).DEFAULT
        model = models.get_model(rest, weights=weights)
        transform = weights.transforms()
    except Exception as error:  # the library raises many unrelated types for a wrong name
        raise _not_loaded("torchvision", rest, error) from error
    return LoadedModel(model.eval(), PilPreprocess(transform), f"torchvision:{rest}")


def load_robustbench(rest: str) -> LoadedModel:
    """`robustbench:NAME?dataset=cifar10&threat=Linf`: a model of RobustBench's zoo.

    The models take pixels in [0, 1] and normalise them themselves, so that the preprocessing only
    sizes and scales images, and `flexure.Bounded` needs no statistics.

    Options: `dataset` (cifar10, cifar100, imagenet), `threat` (Linf, L2, corruptions): the zoo's
    folder of the name, the norm that it was made robust in; `folder`, where downloaded weights are
    kept (RobustBench's own default is `models` in the working directory), by default
    `robustbench` beside what `torch.hub` downloads. RobustBench reads its files by `torch.load`,
    which since torch 2.6 builds tensors alone.

    Raises:
        MissingExtraError: robustbench is not installed, or its torchvision does not fit the torch.
        AddressError: the model cannot be loaded.
    """
    name, options = split_options(rest, known=("dataset", "threat", "folder"))
    dataset, threat = options.get("dataset", "cifar10"), options.get("threat", "Linf")
    default = Path(torch.hub.get_dir()) / "robustbench"
    folder = Path(options.get("folder", default)).expanduser()
    install = (
        "pip install torchvision from the same index as the installed torch, then pip install "
        "robustbench"
    )
    utils = import_extra("robustbench.utils", install=install)
    enums = import_extra("robustbench.model_zoo.enums", install=install)
    data = import_extra("robustbench.data", install=install)
    try:
        kind, norm = enums.BenchmarkDataset(dataset), enums.ThreatModel(threat)
        model = utils.load_model(name, model_dir=folder, dataset=kind, threat_model=norm)
        preprocess: Callable[[Tensor], Tensor] = _CIFAR_PIXELS
        if kind is enums.BenchmarkDataset.imagenet:
            preprocess = PilPreprocess(data.get_preprocessing(kind, norm, name, None))
    except Exception as error:  # the library raises many unrelated types for a wrong name
        raise _not_loaded("robustbench", rest, error) from error
    return LoadedModel(model.eval(), preprocess, f"robustbench:{rest}")


_CIFAR_PIXELS = Preprocess(size=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)


def _not_loaded(library: str, rest: str, error: Exception) -> AddressError:
    return AddressError(
        f"expected a pretrained model at {library}:{rest}, got: {first_line(error)}; check the "
        f"name and the connection"
    )


def _path_of(model: nn.Module, wanted: Any) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)
