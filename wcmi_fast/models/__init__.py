"""The networks of the paper: encoders, classifiers, both sides of the critic, heads (section 5)."""

from wcmi_fast.models.classifiers import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    NAMES,
    Normalise,
    baseline_h,
    baseline_h_linear,
    baseline_h_mlp,
    densenet121,
    resnet18,
    resnet50,
    vgg16,
)
from wcmi_fast.models.critics import GlobalCritic, LocalCritic, OneByOneBlock, VectorCritic
from wcmi_fast.models.dot_critic import DotCritic, FrozenCritic
from wcmi_fast.models.encoders import BaselineH
from wcmi_fast.models.exporting import export, export_weights, load_exported
from wcmi_fast.models.heads import LinearHead, MLPHead
from wcmi_fast.models.loading import load, load_weights, read_state

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "NAMES",
    "BaselineH",
    "DotCritic",
    "FrozenCritic",
    "GlobalCritic",
    "LinearHead",
    "LocalCritic",
    "MLPHead",
    "Normalise",
    "OneByOneBlock",
    "VectorCritic",
    "baseline_h",
    "baseline_h_linear",
    "baseline_h_mlp",
    "densenet121",
    "export",
    "export_weights",
    "load",
    "load_exported",
    "load_weights",
    "read_state",
    "resnet18",
    "resnet50",
    "vgg16",
]
