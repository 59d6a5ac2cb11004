"""Augmentation: torchvision's transforms, image by image and in distribution."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as tv

from wcmi_fast.training.augmentation import Augmentation, augmented, jittered, moved, rotated

PAPER = Augmentation(crop_padding=4, flip=True, jitter=0.25, rotation=2)
STRONG = Augmentation(crop_padding=3, flip=True, jitter=0.6, rotation=45)
COUNT = 64
ADJUSTMENTS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = COUNT, channels: int = 3, height: int = 12, width: int = 10) -> Tensor:
    return torch.rand(count, channels, height, width, generator=seeded(7))


# Each part, image by image


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_crops_and_flips_are_torchvisions(channels: int) -> None:
    x, draws = images(channels=channels), STRONG.draw(COUNT, seeded())
    assert draws.offsets is not None
    assert draws.flips is not None
    found = moved(x, draws.offsets, draws.flips, 3)
    for image, given, offset, flip in zip(found, x, draws.offsets, draws.flips, strict=True):
        wanted = tv.crop(tv.pad(given, [3]), *offset.tolist(), 12, 10)
        assert torch.equal(image, tv.hflip(wanted) if flip else wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions(channels: int) -> None:
    x, draws = images(channels=channels), STRONG.draw(COUNT, seeded())
    assert draws.factors is not None
    assert draws.order is not None
    found = jittered(x, draws.factors, draws.order)
    for image, given, factors, order in zip(found, x, draws.factors, draws.order, strict=True):
        wanted = given
        for kind in order.tolist():
            wanted = ADJUSTMENTS[kind](wanted, factors[kind].item())
        # The mean grey is summed in another order.
        torch.testing.assert_close(image, wanted, rtol=0, atol=1e-6)


def test_saturation_does_nothing_to_grey_images() -> None:
    x, order = images(channels=1), torch.tensor([[2, 0, 1]]).expand(COUNT, 3)
    factors = torch.tensor([[1.0, 1.0, 0.3]]).expand(COUNT, 3)
    assert torch.equal(jittered(x, factors, order), x)


@pytest.mark.parametrize("channels", [1, 3])
def test_rotation_is_torchvisions(channels: int) -> None:
    x, draws = images(channels=channels), STRONG.draw(COUNT, seeded())
    assert draws.angles is not None
    found = rotated(x, draws.angles)
    wanted = torch.stack(
        [tv.rotate(image, angle) for image, angle in zip(x, draws.angles.tolist(), strict=True)]
    )
    # A source that lies between two pixels, up to rounding, may be either.
    assert (found != wanted).float().mean() < 1e-3


def test_a_turn_of_0_and_of_180_degrees() -> None:
    x = images(2)
    assert torch.equal(rotated(x, torch.zeros(2)), x)
    assert torch.equal(rotated(x, torch.full((2,), 180.0)), x.flip(2, 3))


def test_the_parts_come_in_order() -> None:
    x, draws = images(), STRONG.draw(COUNT, seeded())
    assert draws.factors is not None
    assert draws.order is not None
    assert draws.angles is not None
    cut = moved(x, draws.offsets, draws.flips, 3)
    wanted = rotated(jittered(cut, draws.factors, draws.order), draws.angles)
    assert torch.equal(STRONG.augment(x, seeded()), wanted)


# What is drawn


def test_every_offset_is_drawn_equally_often() -> None:
    offsets = Augmentation(crop_padding=2).draw(50_000, seeded()).offsets
    assert offsets is not None
    counts = (5 * offsets[:, 0] + offsets[:, 1]).bincount(minlength=25)
    assert len(counts) == 25
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_half_of_the_images_are_flipped() -> None:
    flips = Augmentation(flip=True).draw(50_000, seeded()).flips
    assert flips is not None
    assert stats.binomtest(int(flips.sum()), 50_000).pvalue > 1e-3


def test_factors_and_angles_are_uniform() -> None:
    draws = Augmentation(jitter=0.25, rotation=2).draw(50_000, seeded())
    assert draws.factors is not None
    assert draws.angles is not None
    for factors in draws.factors.unbind(1):
        assert stats.kstest(factors.numpy(), stats.uniform(0.75, 0.5).cdf).pvalue > 1e-3
    assert stats.kstest(draws.angles.numpy(), stats.uniform(-2, 4).cdf).pvalue > 1e-3
    pairs = torch.cat([draws.factors, draws.angles[:, None]], 1).T.corrcoef()
    assert (pairs - torch.eye(4)).abs().max() < 0.02


def test_every_order_is_drawn_equally_often() -> None:
    order = Augmentation(jitter=0.1).draw(60_000, seeded()).order
    assert order is not None
    codes = (order * torch.tensor([9, 3, 1])).sum(1)
    counts = [int((codes == 9 * a + 3 * b + c).sum()) for a, b, c in permutations(range(3))]
    assert sum(counts) == 60_000
    assert stats.chisquare(counts).pvalue > 1e-3


def test_augmented_images_have_torchvisions_moments() -> None:
    given, count = images(1, height=8, width=8), 1500
    made = STRONG.augment(given.expand(count, 3, 8, 8), seeded(1))
    torchs = transforms.Compose(
        [
            transforms.RandomCrop(8, padding=3),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.6, 0.6, 0.6),
            transforms.RandomRotation(45),
        ]
    )
    theirs = torch.stack([torchs(given[0]) for _ in range(count)])
    for ours, wanted in ((made, theirs), (made.square(), theirs.square())):
        error = ((ours.var(0) + wanted.var(0)) / count).sqrt()
        deviation = (ours.mean(0) - wanted.mean(0)) / error
        # Of 192 standard normal values: the largest, and their mean square.
        assert deviation.abs().max() < 4.5
        assert deviation.square().mean() < 1.6


# Use


def test_a_seed_decides_all() -> None:
    x = images()
    first, again, other = (PAPER.augment(x, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], PAPER.augment(x[:1].expand(2, 3, 12, 10), seeded(3))[1])


def test_nothing_to_do_changes_and_draws_nothing() -> None:
    generator, x = seeded(), images()
    assert Augmentation().augment(x, generator) is x
    assert augmented(Augmentation(), x, generator) is x
    assert augmented(None, x, generator) is x
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_any_number_of_channels_moves() -> None:
    x = images(channels=5)
    moving = Augmentation(flip=True, rotation=10)
    assert torch.equal(moving.augment(x, seeded())[:, :3], moving.augment(x[:, :3], seeded()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_kind_of_tensor_comes_back(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = images().to(dtype).contiguous(memory_format=layout).requires_grad_()
    wanted = STRONG.augment(images().to(dtype), seeded())
    for augmentation in (STRONG, PAPER, Augmentation(flip=True), Augmentation(jitter=0.1)):
        found = augmentation.augment(x, seeded())
        assert found.is_contiguous(memory_format=layout)
        assert (found.shape, found.dtype, found.requires_grad) == (x.shape, dtype, False)
        assert found.min() >= 0
        assert found.max() <= 1
    torch.testing.assert_close(STRONG.augment(x, seeded()), wanted)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"crop_padding": -1}, "crop_padding is -1, wanted an integer, 0 or more"),
        ({"crop_padding": 1.5}, "crop_padding is 1.5, wanted an integer, 0 or more"),
        ({"flip": 1}, "flip is 1, wanted True or False"),
        ({"jitter": 1.1}, "jitter is 1.1, wanted 0 to 1"),
        ({"jitter": float("nan")}, "jitter is nan, wanted 0 to 1"),
        ({"rotation": -2}, "rotation is -2, wanted 0 to 180"),
        ({"rotation": "2"}, "rotation is '2', wanted 0 to 180"),
    ],
)
def test_bad_settings(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^Augmentation: {sentence}$"):
        Augmentation(**options)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.zeros(2, 3, 4), r"images has shape \(2, 3, 4\) and dtype torch.float32, wanted \(N"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "dtype torch.uint8, wanted .* floating point"),
        (torch.zeros(2, 4, 4, 4), "images has 4 channels, wanted 1 or 3 for a jitter"),
    ],
)
def test_bad_images(x: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PAPER.augment(x, seeded())


def test_a_part_of_a_batch_changes_as_in_it() -> None:
    x = torch.rand(6, 3, 8, 8)
    every = Augmentation(crop_padding=2, flip=True, jitter=0.3, rotation=10.0)
    whole = every.augment(x, torch.Generator().manual_seed(0))
    part = every.augment(x[2:5], torch.Generator().manual_seed(0), part_of=(2, 6))
    assert torch.equal(part, whole[2:5])
