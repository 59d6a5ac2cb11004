"""The usual CIFAR networks as functions of a state dict in the layout of kuangliu/pytorch-cifar.

Written from the layout as its users know it, and independent of our modules: `state` draws weights
under those names, and the functions compute with them. MadryLab/robustness and the authors' code
use the same names within their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, linear, max_pool2d, relu

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

VGG = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "densenet121": (6, 12, 24, 16)}


def _norm(name: str, channels: int) -> Shapes:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def _conv(name: str, after: int, before: int, size: int) -> Shapes:
    return {f"{name}.weight": (after, before, size, size)}


def _full(name: str, after: int, before: int) -> Shapes:
    return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}


def vgg16_shapes(channels: int, classes: int) -> Shapes:
    shapes, at = {}, 0
    for width in VGG:
        if width:
            shapes |= _conv(f"features.{at}", width, channels, 3)
            shapes |= {f"features.{at}.bias": (width,)} | _norm(f"features.{at + 1}", width)
            channels = width
        at += 3 if width else 1
    return shapes | _full("classifier", classes, 512)


def _resnet_blocks(name: str) -> Iterator[tuple[str, int, int]]:
    """Yield each block's name, width and stride."""
    for stage, count in enumerate(BLOCKS[name], start=1):
        for block in range(count):
            stride = 2 if stage > 1 and block == 0 else 1
            yield f"layer{stage}.{block}", 32 << stage, stride


def resnet_shapes(name: str, channels: int, classes: int) -> Shapes:
    shapes, before = _conv("conv1", 64, channels, 3) | _norm("bn1", 64), 64
    for block, width, stride in _resnet_blocks(name):
        if name == "resnet18":
            after = width
            shapes |= _conv(f"{block}.conv1", width, before, 3) | _norm(f"{block}.bn1", width)
            shapes |= _conv(f"{block}.conv2", width, width, 3) | _norm(f"{block}.bn2", width)
        else:
            after = 4 * width
            shapes |= _conv(f"{block}.conv1", width, before, 1) | _norm(f"{block}.bn1", width)
            shapes |= _conv(f"{block}.conv2", width, width, 3) | _norm(f"{block}.bn2", width)
            shapes |= _conv(f"{block}.conv3", after, width, 1) | _norm(f"{block}.bn3", after)
        if stride == 2 or before != after:
            shapes |= _conv(f"{block}.shortcut.0", after, before, 1)
            shapes |= _norm(f"{block}.shortcut.1", after)
        before = after
    return shapes | _full("linear", classes, before)


def densenet121_shapes(channels: int, classes: int) -> Shapes:
    shapes, width = _conv("conv1", 64, channels, 3), 64
    for stage, count in enumerate(BLOCKS["densenet121"], start=1):
        for layer in range(count):
            name = f"dense{stage}.{layer}"
            shapes |= _norm(f"{name}.bn1", width) | _conv(f"{name}.conv1", 128, width, 1)
            shapes |= _norm(f"{name}.bn2", 128) | _conv(f"{name}.conv2", 32, 128, 3)
            width += 32
        if stage < 4:
            shapes |= _norm(f"trans{stage}.bn", width)
            shapes |= _conv(f"trans{stage}.conv", width // 2, width, 1)
            width //= 2
    return shapes | _norm("bn", width) | _full("linear", classes, width)


def baseline_shapes(channels: int, flat: int, dim: int) -> Shapes:
    shapes = {}
    for layer, width in enumerate((64, 128, 256)):
        shapes |= _conv(f"layer{layer}.0", width, channels, 4) | _norm(f"layer{layer}.1", width)
        channels = width
    shapes |= _full("layer4.0", 1024, flat) | _norm("layer4.1", 1024)
    return shapes | _full("layer5", dim, 1024)


def mlp_shapes(classes: int) -> Shapes:
    return _full("layer0.0", 200, 64) | _norm("layer0.2", 200) | _full("layer1.0", classes, 200)


def linear_shapes(classes: int) -> Shapes:
    return _full("layer0", classes, 64)


def drawn(shapes: Shapes, seed: int = 3) -> State:
    """Draw weights that any mix-up would show, and that keep activations in bounds."""
    generator = torch.Generator().manual_seed(seed)
    found: State = {}
    for name, shape in shapes.items():
        if not shape:
            found[name] = torch.tensor(7)
        elif len(shape) == 1:
            found[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            found[name] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
    return found


def _normed(state: State, name: str, x: Tensor) -> Tensor:
    parts = ("running_mean", "running_var", "weight", "bias")
    return batch_norm(x, *(state[f"{name}.{part}"] for part in parts))


def vgg16(state: State, x: Tensor) -> Tensor:
    at = 0
    for width in VGG:
        if width:
            x = conv2d(x, state[f"features.{at}.weight"], state[f"features.{at}.bias"], padding=1)
            x = relu(_normed(state, f"features.{at + 1}", x))
        else:
            x = max_pool2d(x, 2)
        at += 3 if width else 1
    return linear(x.flatten(1), state["classifier.weight"], state["classifier.bias"])


def resnet(name: str, state: State, x: Tensor) -> Tensor:
    x = relu(_normed(state, "bn1", conv2d(x, state["conv1.weight"], padding=1)))
    for block, _, stride in _resnet_blocks(name):
        strides, sizes = (
            ((stride, 1), (3, 3)) if name == "resnet18" else ((1, stride, 1), (1, 3, 1))
        )
        y = x
        for i, (step, size) in enumerate(zip(strides, sizes, strict=True), start=1):
            weight = state[f"{block}.conv{i}.weight"]
            y = conv2d(y, weight, stride=step, padding=size // 2)
            y = _normed(state, f"{block}.bn{i}", y)
            y = relu(y) if i < len(sizes) else y
        if f"{block}.shortcut.0.weight" in state:
            x = conv2d(x, state[f"{block}.shortcut.0.weight"], stride=stride)
            x = _normed(state, f"{block}.shortcut.1", x)
        x = relu(x + y)
    return linear(avg_pool2d(x, 4).flatten(1), state["linear.weight"], state["linear.bias"])


def densenet121(state: State, x: Tensor) -> Tensor:
    x = conv2d(x, state["conv1.weight"], padding=1)
    for stage, count in enumerate(BLOCKS["densenet121"], start=1):
        for layer in range(count):
            name = f"dense{stage}.{layer}"
            y = conv2d(relu(_normed(state, f"{name}.bn1", x)), state[f"{name}.conv1.weight"])
            y = relu(_normed(state, f"{name}.bn2", y))
            x = torch.cat([conv2d(y, state[f"{name}.conv2.weight"], padding=1), x], 1)
        if stage < 4:
            x = relu(_normed(state, f"trans{stage}.bn", x))
            x = avg_pool2d(conv2d(x, state[f"trans{stage}.conv.weight"]), 2)
    x = avg_pool2d(relu(_normed(state, "bn", x)), x.shape[-1]).flatten(1)
    return linear(x, state["linear.weight"], state["linear.bias"])


def baseline(state: State, x: Tensor) -> Tensor:
    for layer in range(3):
        x = conv2d(x, state[f"layer{layer}.0.weight"], stride=2, padding=1)
        x = relu(_normed(state, f"layer{layer}.1", x))
    x = linear(x.flatten(1), state["layer4.0.weight"], state["layer4.0.bias"])
    x = relu(_normed(state, "layer4.1", x))
    return linear(x, state["layer5.weight"], state["layer5.bias"])


def mlp(state: State, g: Tensor) -> Tensor:
    hidden = linear(g, state["layer0.0.weight"], state["layer0.0.bias"])
    hidden = relu(_normed(state, "layer0.2", hidden))
    return linear(hidden, state["layer1.0.weight"], state["layer1.0.bias"])


def linear_head(state: State, g: Tensor) -> Tensor:
    return linear(g, state["layer0.weight"], state["layer0.bias"])


NETWORKS: dict[str, tuple[Callable[[int, int], Shapes], Callable[[State, Tensor], Tensor]]] = {
    "vgg16": (vgg16_shapes, vgg16),
    "resnet18": (
        lambda channels, classes: resnet_shapes("resnet18", channels, classes),
        lambda state, x: resnet("resnet18", state, x),
    ),
    "resnet50": (
        lambda channels, classes: resnet_shapes("resnet50", channels, classes),
        lambda state, x: resnet("resnet50", state, x),
    ),
    "densenet121": (densenet121_shapes, densenet121),
}
