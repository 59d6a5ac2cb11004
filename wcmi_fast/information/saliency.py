"""Saliency: the gradient of the information loss with respect to the images (figures 4 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wcmi_fast.attacks import frozen
from wcmi_fast.information.critic import BOUNDS, CriticConfig, batch_bound
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.objective import Critic, information_loss


def saliency(
    encoder: nn.Module,
    critic: Critic,
    x: Tensor,
    *,
    bound: str = "dv",
    critic_grad: CriticGrad = "full",
) -> Tensor:
    """Return the gradient of a batch's information loss, minus the bound, at its images.

    Where it is positive, a brighter pixel lowers the information. The bound is a mean over the
    batch, so an image's gradient is of the order of 1/N.

    Args:
        encoder: images -> representations (N, D); run in eval mode, and left as it was.
        critic: trained for it, such as `train_critic` returns; likewise.
        x: images (N, C, H, W), or vectors (N, D), floating point, N at least 2.
        bound: one of `BOUNDS`; "mine" is dv, whose value it is.
        critic_grad: "full" differentiates both sides of the critic; "encoder_only" the side of the
            representation alone: the map then shows what the encoder sees.

    Returns:
        (N, C, H, W), in nats per unit of pixel, without history.

    Raises:
        ValueError: an unknown bound; a loss that does not depend on the images.

    Equivalent torch program::

        loss = -dv(critic.global_(encoder(x)), critic.local(x))
        (gradient,) = torch.autograd.grad(loss, x)

    Source: Zhu et al. 2020, figures 4 and 5.
    """
    if bound not in BOUNDS:
        raise ValueError(f"saliency: bound is {bound!r}, wanted one of {tuple(BOUNDS)}")
    modules = (encoder, *critic.modules().values())
    with frozen(modules), torch.inference_mode(False):  # which turns gradients on, too
        point = x.detach().clone().requires_grad_()
        function = batch_bound(CriticConfig(bound=bound, critic_grad=critic_grad), None)
        loss = information_loss(encoder, critic, function, critic_grad)(point)
        if not loss.requires_grad:
            raise ValueError(
                "saliency: the information loss does not depend on x, wanted an encoder that is "
                "differentiable in the images"
            )
        (gradient,) = torch.autograd.grad(loss, point, materialize_grads=True)
    return gradient


class Feature(nn.Module):
    """One feature of a representation, as a representation of its own.

    Its critic is trained as any other, by `train_critic(Feature(encoder, index), ...)`.

    Args:
        encoder: images -> representations (N, D).
        index: of the feature, 0 to D - 1.
    """

    def __init__(self, encoder: nn.Module, index: int) -> None:
        super().__init__()
        self.encoder, self.index = encoder, index

    def forward(self, x: Tensor) -> Tensor:
        """Map images to the feature (N, 1).

        Raises:
            ValueError: there is no such feature.
        """
        found: Tensor = self.encoder(x).flatten(1)
        if not 0 <= self.index < found.shape[1]:
            raise ValueError(
                f"Feature: index is {self.index}, wanted 0 to {found.shape[1] - 1}, the features "
                "of the representation"
            )
        return found[:, self.index, None]


def object_share(maps: Tensor, x: Tensor) -> Tensor:
    """Return which share of each map's energy, its sum of squares, lies on the object's pixels.

    Those are the pixels of the image that are not 0, for images of one object before black. A map
    of zeros has no share: NaN.

    Args:
        maps: saliency maps (N, C, H, W), floating point.
        x: their images, of the same shape.

    Returns:
        (N,), in [0, 1].

    Raises:
        ValueError: shapes that differ.
    """
    if maps.shape != x.shape or maps.ndim != 4:
        raise ValueError(
            f"object_share: maps has shape {tuple(maps.shape)} and x {tuple(x.shape)}, wanted the "
            "same (N, C, H, W)"
        )
    energy = maps.square().sum(1)
    on_object = (x != 0).any(1)
    return (energy * on_object).sum((1, 2)) / energy.sum((1, 2))
