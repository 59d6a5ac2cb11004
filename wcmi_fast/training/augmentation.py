"""Random crops, flips, colours and rotations of a batch, on its device, by a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from wcmi_fast.distributed import ranks
from wcmi_fast.training.seeds import starts_generator

# Weights of red, green and blue in a pixel's grey, as torchvision has them.
GREY = (0.2989, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION = range(3)
HALF_TURN = 180


class Draws(NamedTuple):
    """What is random about a batch of N images; None for what an augmentation leaves out.

    Attributes:
        offsets: (N, 2), int64: row and column of the crop in the padded image, from 0 on.
        flips: (N,), bool: whether left and right are swapped.
        factors: (N, 3), float32: of brightness, contrast and saturation.
        order: (N, 3), int64: these three, in the order in which they are changed.
        angles: (N,), float32: degrees, counter-clockwise.
    """

    offsets: Tensor | None
    flips: Tensor | None
    factors: Tensor | None
    order: Tensor | None
    angles: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of training images, each image's its own: crop, flip, colours, rotation.

    They are made in this order, for all images of a batch at once. Equivalent torch program, on one
    image of size H::

        transforms.Compose([
            transforms.RandomCrop(H, padding=crop_padding),
            transforms.RandomHorizontalFlip(0.5 if flip else 0.0),
            transforms.ColorJitter(jitter, jitter, jitter),  # in an order of its own for each image
            transforms.RandomRotation(rotation),  # to the nearest pixel, around the centre
        ])

    Args:
        crop_padding: pixels of zeros around the image, of which a part of its size is cut out; 0
            cuts nothing.
        flip: swap left and right, of each image with probability 1/2.
        jitter: brightness, contrast and saturation are multiplied by factors from 1 - jitter to
            1 + jitter; 0 to 1. There is no change of hue. Grey images have no saturation.
        rotation: largest angle, in degrees, 0 to 180; what comes from outside is 0.

    Raises:
        TypeError, ValueError: a field of the wrong type, or out of the range given above.

    Source: Zhu et al. 2020, section 5 (spec section 6): padding 4, flips, colour jitter .25 and
    rotation 2, by the transforms of MadryLab/robustness, which these are.
    """

    crop_padding: int = 0
    flip: bool = False
    jitter: float = 0.0
    rotation: float = 0.0

    def __post_init__(self) -> None:
        padding = self.crop_padding
        if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
            raise ValueError(
                f"Augmentation: crop_padding is {padding!r}, wanted an integer, 0 or more"
            )
        if not isinstance(self.flip, bool):
            raise TypeError(f"Augmentation: flip is {self.flip!r}, wanted True or False")
        for name, most in (("jitter", 1), ("rotation", HALF_TURN)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= most:
                raise ValueError(f"Augmentation: {name} is {value!r}, wanted 0 to {most}")

    @torch.no_grad()
    def augment(
        self,
        images: Tensor,
        generator: torch.Generator,
        *,
        part_of: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return changed images.

        Args:
            images: (N, C, H, W), floating point, in [0, 1], in any memory format.
            generator: source of all that is random, on the device of images.
            part_of: as for `PGD.attack`: images then change as in that batch.

        Returns:
            Images of the shape, dtype, device and memory format of images, in [0, 1]; images itself
            where nothing is to be changed, and then nothing is drawn.

        Raises:
            ValueError: images is not floating point of (N, C, H, W); C is not 1 or 3 with a jitter.
        """
        _check(self, images)
        first, rows = (0, len(images)) if part_of is None else part_of
        own = slice(first, first + len(images))
        drawn = self.draw(rows, generator)
        draws = Draws(*(None if each is None else each[own] for each in drawn))
        found = images
        if draws.offsets is not None or draws.flips is not None:
            found = moved(found, draws.offsets, draws.flips, self.crop_padding)
        if draws.factors is not None and draws.order is not None:
            found = jittered(found, draws.factors, draws.order)
        return found if draws.angles is None else rotated(found, draws.angles)

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """Draw what is random about so many images, on the generator's device."""

        def uniform(low: float, high: float, *columns: int) -> Tensor:
            drawn = torch.rand(count, *columns, generator=generator, device=generator.device)
            return low + (high - low) * drawn

        def integers(most: int, *columns: int) -> Tensor:
            shape = (count, *columns)
            return torch.randint(most + 1, shape, generator=generator, device=generator.device)

        jitter, angle = self.jitter, self.rotation
        return Draws(
            offsets=integers(2 * self.crop_padding, 2) if self.crop_padding else None,
            flips=integers(1).bool() if self.flip else None,
            factors=uniform(1 - jitter, 1 + jitter, 3) if jitter else None,
            order=uniform(0, 1, 3).argsort(1) if jitter else None,
            angles=uniform(-angle, angle) if angle else None,
        )


def augmented(
    augmentation: Augmentation | None, images: Tensor, generator: torch.Generator
) -> Tensor:
    """Return a batch augmented by an epoch's generator, on the host; or, for None, as it is."""
    if augmentation is None:
        return images
    starts = starts_generator(generator, images.device)
    return augmentation.augment(images, starts, part_of=ranks.part_of(images))


def moved(images: Tensor, offsets: Tensor | None, flips: Tensor | None, padding: int) -> Tensor:
    """Cut images out of zero-padded ones, at offsets (N, 2), then flip those of flips (N,)."""
    count, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).expand(count, height)
    columns = torch.arange(width, device=device).expand(count, width)
    if flips is not None:
        columns = torch.where(flips[:, None], columns.flip(1), columns)
    if offsets is not None:
        rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
        images = pad(images, [padding] * 4)
    image = torch.arange(count, device=device)[:, None, None]
    found = images[image, :, rows[:, :, None], columns[:, None, :]]
    return _laid_out(found.permute(0, 3, 1, 2), images)


def jittered(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast and saturation by factors (N, 3), in each image's order (N, 3).

    Each is a mixture of the image and another one, cut to [0, 1]: black, its mean grey, its grey.
    """
    if images.shape[1] == 1:
        factors = factors.clone()
        factors[:, SATURATION] = 1
    for kind in order.unbind(1):
        factor = factors.gather(1, kind[:, None])[:, :, None, None].to(images.dtype)
        kind = kind[:, None, None, None]
        grey = _grey(images)
        other = torch.where(kind == CONTRAST, grey.mean((1, 2, 3), keepdim=True), grey)
        other = other.masked_fill(kind == BRIGHTNESS, 0)
        images = (factor * images + (1 - factor) * other).clamp(0, 1)
    return images


def rotated(images: Tensor, angles: Tensor) -> Tensor:
    """Rotate images by angles (N,), in degrees, counter-clockwise, to the nearest pixel."""
    height, width = images.shape[2:]
    turns = (angles * (math.pi / HALF_TURN)).to(images.dtype)
    cos, sin, zero = turns.cos(), turns.sin(), torch.zeros_like(turns)
    # In the grid's units both sides are 2 long.
    rows = (cos, -sin * (height / width), zero, sin * (width / height), cos, zero)
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return _laid_out(grid_sample(images, grid, mode="nearest", align_corners=False), images)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, 1)
    grey: Tensor = GREY[0] * red + GREY[1] * green + GREY[2] * blue
    return grey


def _laid_out(found: Tensor, like: Tensor) -> Tensor:
    """Return images in the memory format of others."""
    rows = like.is_contiguous()
    return found.contiguous(memory_format=torch.contiguous_format if rows else torch.channels_last)


def _check(augmentation: Augmentation, images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"Augmentation: images has shape {tuple(images.shape)} and dtype {images.dtype}, "
            "wanted (N, C, H, W), floating point"
        )
    if augmentation.jitter and images.shape[1] not in (1, 3):
        raise ValueError(
            f"Augmentation: images has {images.shape[1]} channels, wanted 1 or 3 for a jitter"
        )
