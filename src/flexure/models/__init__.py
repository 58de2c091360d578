"""Models by address with their own preprocessing, CIFAR ResNets, and a small MLP."""

from flexure.models.mlp import MLP
from flexure.models.preprocess import (
    CIFAR,
    AsFloat,
    PilPreprocess,
    Preprocess,
    ProcessorPreprocess,
)
from flexure.models.resnet import DEPTHS, CifarResNet
from flexure.models.sources import CATALOGUE, load_model, load_weights

__all__ = [
    "CATALOGUE",
    "CIFAR",
    "DEPTHS",
    "MLP",
    "AsFloat",
    "CifarResNet",
    "PilPreprocess",
    "Preprocess",
    "ProcessorPreprocess",
    "load_model",
    "load_weights",
]
