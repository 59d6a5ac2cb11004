"""The paper's classifiers in CIFAR form, whose logits are the representation (spec section 5).

Each is a plain sequence of named parts, so that any of them is a layer to measure: ``layer3.1``,
``denseblock2``. torchvision's blocks are used where they fit; it is imported on the first call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wcmi_fast.models.encoders import BaselineH, check_images, check_input_shape, check_size
from wcmi_fast.models.heads import LinearHead, MLPHead

if TYPE_CHECKING:
    from torchvision.models.resnet import BasicBlock, Bottleneck

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# Size of the representation in front of the paper's heads.
REPRESENTATION = 64
SMALLEST_HALVINGS = 3

Shape = tuple[int, int, int]
Classifier = Callable[..., nn.Sequential]


class Normalise(nn.Module):
    """The first layer of every classifier: images in [0, 1] to (x - mean) / std per channel.

    Args:
        owner: name of the classifier, for errors.
        input_shape: (C, H, W) of one image.
        mean: C values; None is 0.
        std: C positive values; None is 1.

    Raises:
        ValueError: not a value per channel; a std that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        owner: str,
        input_shape: Shape,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.owner, self.input_shape = owner, input_shape
        channels = input_shape[0]
        for name, given, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = [default] * channels if given is None else list(given)
            if len(values) != channels or (name == "std" and min(values) <= 0):
                wanted = "a value" if name == "mean" else "a positive value"
                raise ValueError(
                    f"{owner}: {name} is {given}, wanted {wanted} for each of {channels} channels"
                )
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W), floating point, to the same shape.

        Raises:
            ValueError: x is not (N, *input_shape).
        """
        check_images(self.owner, x, self.input_shape)
        return (x - self.mean) / self.std


def vgg16(
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Build VGG16 with batch norm and one linear layer on 512 features, as is usual for CIFAR.

    Poolings of odd sizes round up, so that 28x28 images come through as 32x32 ones do.

    Args:
        input_shape: (C, H, W) of one image, H and W at least 8.
        classes: number K of classes.
        mean: of each channel, subtracted from images in [0, 1]; None is 0.
        std: of each channel, divided by; None is 1.

    Returns:
        The untrained network: images (N, C, H, W), float32 in [0, 1], to logits (N, K). Its layers
        are normalise, features.0 to features.43, avgpool, flatten and classifier.

    Raises:
        TypeError, ValueError: sizes that are not positive integers; images too small; mean or std
            that does not fit.

    Equivalent torch program::

        features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], True)
        nn.Sequential(normalise, features, nn.Flatten(), nn.Linear(512, classes))

    Source: Simonyan and Zisserman 2015; the form for CIFAR, with its count of 14,728,266
    parameters, is that of kuangliu/pytorch-cifar; Zhu et al. 2020, section 5.
    """
    from torchvision.models.vgg import cfgs, make_layers

    first = _checked("vgg16", input_shape, classes, mean, std)
    features = make_layers(cfgs["D"], batch_norm=True)
    features[0] = nn.Conv2d(first.input_shape[0], 64, 3, padding=1)
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
        if isinstance(layer, nn.Conv2d):  # as torchvision: else 13 layers leave nothing of x
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return _sequence(
        normalise=first,
        features=features,
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Linear(512, classes),
    )


def resnet18(
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Build ResNet-18 with a first convolution of 3x3 and no pooling, as is usual for CIFAR.

    Args:
        input_shape, classes, mean, std: as for `vgg16`.

    Returns:
        The untrained network: images (N, C, H, W), float32 in [0, 1], to logits (N, K). Its layers
        are normalise, conv1, bn1, relu, layer1.0 to layer4.1, avgpool, flatten and fc.

    Raises:
        TypeError, ValueError: as `vgg16`.

    Equivalent torch program::

        net = torchvision.models.resnet18(num_classes=classes)
        net.conv1, net.maxpool = nn.Conv2d(C, 64, 3, padding=1, bias=False), nn.Identity()

    Source: He et al. 2016; the form for CIFAR, with its count of 11,173,962 parameters, is that of
    kuangliu/pytorch-cifar; Zhu et al. 2020, section 5.
    """
    from torchvision.models.resnet import BasicBlock

    first = _checked("resnet18", input_shape, classes, mean, std)
    return _resnet(first, BasicBlock, [2, 2, 2, 2], classes)


def resnet50(
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Build ResNet-50 with a first convolution of 3x3 and no pooling, as is usual for CIFAR.

    Args:
        input_shape, classes, mean, std: as for `vgg16`.

    Returns:
        The untrained network: images (N, C, H, W), float32 in [0, 1], to logits (N, K). Its layers
        are normalise, conv1, bn1, relu, layer1.0 to layer4.2, avgpool, flatten and fc.

    Raises:
        TypeError, ValueError: as `vgg16`.

    Equivalent torch program::

        net = torchvision.models.resnet50(num_classes=classes)
        net.conv1, net.maxpool = nn.Conv2d(C, 64, 3, padding=1, bias=False), nn.Identity()

    Source: He et al. 2016; the form for CIFAR, with its count of 23,520,842 parameters, is that of
    kuangliu/pytorch-cifar and of MadryLab/robustness; Zhu et al. 2020, section 5.
    """
    from torchvision.models.resnet import Bottleneck

    first = _checked("resnet50", input_shape, classes, mean, std)
    return _resnet(first, Bottleneck, [3, 4, 6, 3], classes)


def densenet121(
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Build DenseNet-121 with a first convolution of 3x3 and no pooling, as is usual for CIFAR.

    Args:
        input_shape, classes, mean, std: as for `vgg16`.

    Returns:
        The untrained network: images (N, C, H, W), float32 in [0, 1], to logits (N, K). Its layers
        are normalise, conv0, denseblock1, transition1 to denseblock4, norm5, relu, avgpool, flatten
        and classifier.

    Raises:
        TypeError, ValueError: as `vgg16`.

    Equivalent torch program::

        net = torchvision.models.densenet121(num_classes=classes)
        net.features[:4] = nn.Conv2d(C, 64, 3, padding=1, bias=False)

    Source: Huang et al. 2017; the form for CIFAR, with its count of 6,956,298 parameters, is that
    of kuangliu/pytorch-cifar; Zhu et al. 2020, section 5.
    """
    from torchvision.models.densenet import DenseNet

    first = _checked("densenet121", input_shape, classes, mean, std)
    net = DenseNet(num_classes=classes)
    stem = ("conv0", "norm0", "relu0", "pool0")
    return _sequence(
        normalise=first,
        conv0=nn.Conv2d(first.input_shape[0], 64, 3, padding=1, bias=False),
        **{name: part for name, part in net.features.named_children() if name not in stem},
        relu=nn.ReLU(inplace=True),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=net.classifier,
    )


def baseline_h(
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Build the parts of `BaselineH`, under their names, with dim = classes, after normalising.

    Args:
        input_shape, mean, std: as for `vgg16`.
        classes: size of the output: the number of classes, or 64 for the paper's representation.

    Returns:
        The untrained network: images (N, C, H, W), float32 in [0, 1], to (N, classes). Its layers
        are normalise, convolutions.0 to convolutions.8, flatten, hidden and output.

    Raises:
        TypeError, ValueError: as `vgg16`.

    Equivalent torch program::

        nn.Sequential(normalise, BaselineH(input_shape, dim=classes))

    Source: Hjelm et al. 2018; Zhu et al. 2020, section 5.
    """
    return _sequence(**_baseline("baseline_h", input_shape, classes, classes, mean, std))


def baseline_h_mlp(
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Build Baseline-H of 64 outputs with the MLP head: the authors' ``baseline_mlp``.

    Args:
        input_shape, classes, mean, std: as for `vgg16`.

    Returns:
        The untrained network: images (N, C, H, W), float32 in [0, 1], to logits (N, K). Its layers
        are those of `baseline_h` and head; ``output`` is the representation.

    Raises:
        TypeError, ValueError: as `vgg16`.

    Equivalent torch program::

        nn.Sequential(normalise, BaselineH(input_shape, dim=64), MLPHead(64, classes))

    Source: Zhu et al. 2020, section 5 and table 1.
    """
    parts = _baseline("baseline_h_mlp", input_shape, classes, REPRESENTATION, mean, std)
    return _sequence(**parts, head=MLPHead(REPRESENTATION, classes))


def baseline_h_linear(
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Build Baseline-H of 64 outputs with the linear head: the authors' ``baseline_linear``.

    Args:
        input_shape, classes, mean, std: as for `vgg16`.

    Returns:
        The untrained network: images (N, C, H, W), float32 in [0, 1], to logits (N, K). Its layers
        are those of `baseline_h` and head; ``output`` is the representation.

    Raises:
        TypeError, ValueError: as `vgg16`.

    Equivalent torch program::

        nn.Sequential(normalise, BaselineH(input_shape, dim=64), LinearHead(64, classes))

    Source: Zhu et al. 2020, section 5 and table 1.
    """
    parts = _baseline("baseline_h_linear", input_shape, classes, REPRESENTATION, mean, std)
    return _sequence(**parts, head=LinearHead(REPRESENTATION, classes))


CLASSIFIERS: dict[str, Classifier] = {
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "densenet121": densenet121,
    "baseline_h": baseline_h,
    "baseline_h_mlp": baseline_h_mlp,
    "baseline_h_linear": baseline_h_linear,
}
NAMES = tuple(CLASSIFIERS)


def _checked(
    owner: str,
    input_shape: Sequence[int],
    classes: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Normalise:
    check_size(owner, "classes", classes)
    shape = check_input_shape(owner, input_shape, halvings=SMALLEST_HALVINGS)
    return Normalise(owner, shape, mean, std)


def _sequence(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _resnet(
    first: Normalise, block: type[BasicBlock | Bottleneck], layers: list[int], classes: int
) -> nn.Sequential:
    from torchvision.models.resnet import ResNet

    net = ResNet(block, layers, num_classes=classes)
    return _sequence(
        normalise=first,
        conv1=nn.Conv2d(first.input_shape[0], 64, 3, padding=1, bias=False),
        bn1=net.bn1,
        relu=net.relu,
        layer1=net.layer1,
        layer2=net.layer2,
        layer3=net.layer3,
        layer4=net.layer4,
        avgpool=net.avgpool,
        flatten=nn.Flatten(),
        fc=net.fc,
    )


def _baseline(
    owner: str,
    input_shape: Sequence[int],
    classes: int,
    dim: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> dict[str, nn.Module]:
    first = _checked(owner, input_shape, classes, mean, std)
    encoder = BaselineH(first.input_shape, dim=dim)
    return {
        "normalise": first,
        "convolutions": encoder.convolutions,
        "flatten": nn.Flatten(),
        "hidden": encoder.hidden,
        "output": encoder.output,
    }
