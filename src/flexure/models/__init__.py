"""Models by address with their own preprocessing; ResNets, VGG-11 and MLPs of our own.

ResNet-18, ResNet-34 and VGG-11 are also built as low-curvature networks.
"""

from flexure.models.builder import RESIDUAL_FACTORS
from flexure.models.mlp import MLP
from flexure.models.own import NETWORKS
from flexure.models.preprocess import (
    CIFAR,
    AsFloat,
    PilPreprocess,
    Preprocess,
    ProcessorPreprocess,
)
from flexure.models.resnet import DEPTHS, CifarResNet, WideResNet, resnet18, resnet34
from flexure.models.sources import CATALOGUE, load_model
from flexure.models.vgg import VGG, vgg11
from flexure.models.weights import load_weights

__all__ = [
    "CATALOGUE",
    "CIFAR",
    "DEPTHS",
    "MLP",
    "NETWORKS",
    "RESIDUAL_FACTORS",
    "VGG",
    "AsFloat",
    "CifarResNet",
    "PilPreprocess",
    "Preprocess",
    "ProcessorPreprocess",
    "WideResNet",
    "load_model",
    "load_weights",
    "resnet18",
    "resnet34",
    "vgg11",
]
