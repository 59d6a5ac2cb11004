from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from wcmi_fast import PGD, reference
from wcmi_fast.information import (
    CAVEAT,
    CriticConfig,
    Estimate,
    evaluate_critic,
    representation_vulnerability,
    train_critic,
)
from wcmi_fast.models import BaselineH
from wcmi_fast.theory import adversarial_accuracy_upper_bound
from wcmi_fast.training import loop

SHAPE = (1, 8, 8)
ATTACK = PGD(eps=0.2, step_size=0.1, steps=3)
SMALL = CriticConfig(units=16, epochs=30, batch_size=20, learning_rate=1e-2)


def images(n: int, seed: int) -> Tensor:
    """Images of one brightness each: one number tells an image from the others."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(n, 1, 1, 1, generator=generator)
    return (0.9 * level + 0.1 * torch.rand(n, *SHAPE, generator=generator)).clamp(0, 1)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 4) + 0 * x.flatten(1).sum(1, keepdim=True)


def test_an_encoder_that_tells_nothing_has_no_information() -> None:
    critic = train_critic(Constant(), images(100, 0), SMALL, attack=None, seed=0)
    found = evaluate_critic(Constant(), critic, images(100, 1), SMALL, attack=None)
    assert abs(found.mean) < 0.05


def test_an_encoder_that_tells_the_image_has_information() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    critic = train_critic(encoder, images(100, 0), SMALL, attack=None, seed=0)
    found = evaluate_critic(encoder, critic, images(100, 1), SMALL, attack=None)
    assert found.mean > 0.2
    assert found.mean > 3 * found.standard_error


def test_evaluation_is_the_mean_over_equal_batches() -> None:
    torch.manual_seed(0)
    encoder, critic = BaselineH(SHAPE, dim=4).eval(), loop.new_critic(4, 16, SHAPE)
    critic = loop.Critic(critic.global_.eval(), critic.local.eval())
    x = images(50, 0)
    found = evaluate_critic(encoder, critic, x, SMALL, attack=None)
    parts = [x[:20], x[20:40]]
    wanted = [
        reference.dv(reference.scores(critic.global_(encoder(v)), critic.local(v))).item()
        for v in parts
    ]
    assert found.batches == pytest.approx(wanted, rel=1e-4)
    assert found.mean == pytest.approx(sum(wanted) / 2, rel=1e-4)
    assert found.standard_error == pytest.approx(abs(wanted[0] - wanted[1]) / 2, rel=1e-3)


def test_vulnerability_is_the_paired_difference_and_the_attack_lowers_information() -> None:
    torch.manual_seed(0)
    encoder = BaselineH(SHAPE, dim=4)
    config = replace(SMALL, epochs=5)
    found = representation_vulnerability(
        encoder, images(100, 0), images(60, 1), attack=ATTACK, classes=10, config=config
    )
    pairs = zip(found.information.batches, found.worst_case.batches, strict=True)
    differences = [a - b for a, b in pairs]
    assert found.vulnerability.batches == pytest.approx(differences)
    assert found.vulnerability.mean > 0
    assert found.accuracy_bound == adversarial_accuracy_upper_bound(found.worst_case.mean, 10)
    assert found.to_dict()["information"]["mean"] == found.information.mean
    again = representation_vulnerability(
        encoder, images(100, 0), images(60, 1), attack=ATTACK, classes=10, config=config
    )
    assert again == found


def test_the_critic_of_the_best_batch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from wcmi_fast import functional, information

    torch.manual_seed(0)
    encoder = BaselineH(SHAPE, dim=4)
    calls, snapshots = [], []
    dv, snapshot = functional.dv, information._snapshot

    def highest_at_the_eighth_batch(z: Tensor, h: Tensor) -> Tensor:
        calls.append(1)
        return 1e-3 * dv(z, h) - abs(len(calls) - 8)

    def recorded(critic: loop.Critic) -> loop.Critic:
        snapshots.append((len(calls), snapshot(critic)))
        return snapshots[-1][1]

    monkeypatch.setattr(functional, "dv", highest_at_the_eighth_batch)
    monkeypatch.setattr(information, "_snapshot", recorded)
    kept = train_critic(encoder, images(100, 0), replace(SMALL, epochs=4), attack=None, seed=0)
    assert len(calls) == 20
    assert snapshots[-1] == (8, kept)


def test_a_trained_critic_is_a_better_start_and_is_not_changed() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    torch.manual_seed(1)
    start = loop.new_critic(4, 16, SHAPE)
    for _ in range(60):
        x = images(20, int(torch.randint(1000, ())))
        value = reference.dv(reference.scores(start.global_(encoder(x)), start.local(x)))
        value.backward()
        for side in start.modules().values():
            for weight in side.parameters():
                weight.data -= -0.02 * weight.grad.sign()
                weight.grad = None
    before = [v.clone() for side in start.modules().values() for v in side.state_dict().values()]
    few = replace(SMALL, epochs=1, learning_rate=1e-4)
    means = []
    for given in (None, start):
        critic = train_critic(encoder, images(100, 0), few, attack=None, seed=0, start=given)
        means.append(evaluate_critic(encoder, critic, images(100, 1), few, attack=None).mean)
    assert means[1] > means[0] + 0.1
    after = [v for side in start.modules().values() for v in side.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_batch_has_no_standard_error() -> None:
    assert math.isnan(Estimate.of([1.0]).standard_error)


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(ValueError, match="batch_size is 20, wanted 1 to n = 10"):
        train_critic(Constant(), images(10, 0), SMALL, attack=None, seed=0)


def test_the_caveat_says_what_the_numbers_are_not() -> None:
    assert "not certificates" in CAVEAT
    assert "from below" in CAVEAT
    assert "from above" in CAVEAT
