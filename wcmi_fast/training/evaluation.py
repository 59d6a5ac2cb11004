"""Representations and accuracies of trained networks, natural and under attack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wcmi_fast.attacks import PGD
from wcmi_fast.data import Feed
from wcmi_fast.models.folding import folded


def classification_loss(
    encoder: nn.Module, head: nn.Module, labels: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return the attacker's loss x -> cross-entropy per image (N,), in nats."""
    return lambda x: cross_entropy(head(encoder(x)), labels, reduction="none")


@torch.no_grad()
def represent(encoder: nn.Module, x: Tensor | Feed, *, batch_size: int = 500) -> Tensor:
    """Return the representations (N, D) of images, without gradient."""
    return torch.cat([encoder(part) for part in x.split(batch_size)])


def accuracy(
    encoder: nn.Module,
    head: nn.Module,
    x: Tensor | Feed,
    y: Tensor | Feed,
    *,
    attack: PGD | None,
    batch_size: int = 125,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Return the share of images classified correctly, in [0, 1], under an attack if one is given.

    Args:
        encoder: images -> representations; evaluated in eval mode.
        head: representations -> logits; evaluated in eval mode.
        x: images (N, C, H, W), float32 in [0, 1], on the encoder's device; or a `Feed`.
        y: labels (N,), int64, on the same device; or a `Feed`.
        attack: maximises each image's cross-entropy; None for natural accuracy.
        batch_size: images per batch; does not affect the result.
        on_batch: called after every batch.
    """
    encoder, head = folded(encoder), folded(head)
    correct = 0
    for clean, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        images = clean
        if attack is not None:
            images = attack.attack(classification_loss(encoder, head, labels), images)
        predicted = head(represent(encoder, images)).argmax(1)
        correct += int((predicted == labels).sum())
        on_batch()
    return correct / len(x)


def interval(share: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval (Wilson) of an accuracy, of which a share of images was right.

    It is about the choice of test images, not about that of a seed.
    """
    from scipy.stats import binomtest

    found = binomtest(round(share * images), images).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
