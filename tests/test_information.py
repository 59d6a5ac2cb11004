"""Critics: trained, attacked and evaluated."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wcmi_fast import PGD, functional, reference
from wcmi_fast.functional.bounds import CriticStats
from wcmi_fast.information import CriticConfig, evaluate_critic, train_critic
from wcmi_fast.information import critic as module
from wcmi_fast.models import BaselineH
from wcmi_fast.training.objective import Critic, new_critic
from wcmi_fast.training.run_folder import RunFolder

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


def telling() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


def mean_of(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def test_an_encoder_that_tells_nothing_has_no_information() -> None:
    found = train_critic(Constant(), images(100, 0), SMALL, attack=None, seed=0)
    tested = evaluate_critic(Constant(), found.critic, images(100, 1), SMALL, attack=None)
    assert abs(mean_of(tested.values)) < 0.05


@pytest.mark.parametrize("bound", ["dv", "infonce", "nwj", "mine"])
def test_an_encoder_that_tells_the_image_has_information(bound: str) -> None:
    config = replace(SMALL, bound=bound, epochs=10)
    found = train_critic(telling(), images(300, 0), config, attack=None, seed=0)
    tested = evaluate_critic(telling(), found.critic, images(100, 1), config, attack=None)
    assert 0.2 < mean_of(tested.values) < math.log(20) + 0.5
    assert found.curve[-1] > found.curve[0]
    assert len(found.curve) == 10


def test_evaluation_is_the_bound_of_equal_batches() -> None:
    encoder, critic = BaselineH(SHAPE, dim=4).eval(), new_critic(4, 16, SHAPE)
    critic = Critic(critic.global_.eval(), critic.local.eval())
    x = images(50, 0)
    found = evaluate_critic(encoder, critic, x, SMALL, attack=None)
    parts = [x[:20], x[20:40]]
    scores = [reference.scores(critic.global_(encoder(v)), critic.local(v)) for v in parts]
    assert found.values == pytest.approx([reference.dv(T).item() for T in scores], rel=1e-4)
    own = [T.mean(0) + T.mean(1)[:, None] - T.mean((0, 1)) for T in scores]
    spreads = [
        (T - each).square().mean().sqrt().item() for T, each in zip(scores, own, strict=True)
    ]
    assert found.score_spread == pytest.approx(min(spreads), rel=1e-4)
    assert found.trace == ()


def test_bytes_are_images() -> None:
    encoder, x = BaselineH(SHAPE, dim=4), (images(60, 0) * 255).byte()
    config = replace(SMALL, epochs=1)
    found = train_critic(encoder, x, config, attack=None, seed=0)
    same = train_critic(encoder, x.float() / 255, config, attack=None, seed=0)
    assert found.curve == same.curve
    pair = [
        evaluate_critic(encoder, found.critic, rows, config, attack=ATTACK).values
        for rows in (x, x.float() / 255)
    ]
    assert pair[0] == pair[1]


def test_the_trace_of_an_attack_starts_clean_ends_attacked_and_falls() -> None:
    encoder = BaselineH(SHAPE, dim=4)
    found = train_critic(encoder, images(100, 0), replace(SMALL, epochs=5), attack=None, seed=0)
    clean = evaluate_critic(encoder, found.critic, images(60, 1), SMALL, attack=None)
    attacked = evaluate_critic(encoder, found.critic, images(60, 1), SMALL, attack=ATTACK)
    assert len(attacked.trace) == ATTACK.steps + 1
    assert attacked.trace[0] == pytest.approx(mean_of(clean.values), rel=1e-4)
    assert attacked.trace[-1] == pytest.approx(mean_of(attacked.values))
    assert attacked.trace[-1] < attacked.trace[0] - 0.05
    assert attacked.zero_gradients == attacked.nonfinite_gradients == 0


def test_zero_and_infinite_gradients_are_counted() -> None:
    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4].round()

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (
                x.flatten(1)[:, :4].sub(x.flatten(1)[:, :4].detach()).sqrt() + x.flatten(1)[:, :4]
            )

    config = replace(SMALL, critic_grad="encoder_only")
    x, critic = images(40, 0), new_critic(4, 16, SHAPE)
    assert evaluate_critic(Blind(), critic, x, config, attack=ATTACK).zero_gradients == 1
    broken = evaluate_critic(Broken(), critic, x, config, attack=ATTACK)
    assert 0.04 < broken.nonfinite_gradients < 0.08  # 4 of 64 pixels


def test_a_worst_case_critic_is_trained_on_attacked_batches() -> None:
    encoder, config = telling(), replace(SMALL, epochs=15)
    normal = train_critic(encoder, images(100, 0), config, attack=None, seed=0)
    worst = train_critic(encoder, images(100, 0), config, attack=ATTACK, seed=0)
    values = [
        mean_of(evaluate_critic(encoder, c.critic, images(100, 1), config, attack=ATTACK).values)
        for c in (normal, worst)
    ]
    assert values[1] > values[0] + 0.05


def test_the_critic_of_the_best_batch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = BaselineH(SHAPE, dim=4)
    calls: list[dict[str, Tensor]] = []
    sides: list[nn.Module] = []
    new_critic = module.new_critic

    def seen(*args: Any) -> Critic:
        critic = new_critic(*args)
        sides.append(critic.local)
        return critic

    def highest_at_the_eighth_batch(z: Tensor, h: Tensor) -> Tensor:
        calls.append({k: v.clone() for k, v in sides[0].state_dict().items()})
        return 1e-3 * functional.dv(z, h) - abs(len(calls) - 8)

    monkeypatch.setattr(module, "new_critic", seen)
    monkeypatch.setitem(module.BOUNDS, "dv", highest_at_the_eighth_batch)
    found = train_critic(encoder, images(100, 0), replace(SMALL, epochs=4), attack=None, seed=0)
    assert len(calls) == 20
    assert found.best_batch == 7
    kept = found.critic.local.get_parameter("block.shortcut.weight")
    assert torch.equal(kept, calls[7]["block.shortcut.weight"])
    assert not torch.equal(kept, calls[8]["block.shortcut.weight"])


def test_an_interrupted_critic_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    encoder, config = BaselineH(SHAPE, dim=4), replace(SMALL, epochs=3)

    def trained(folder: str, **options: Any) -> module.TrainedCritic:
        run = RunFolder(tmp_path / folder)
        return train_critic(
            encoder, images(100, 0), config, attack=ATTACK, seed=0, run=run, **options
        )

    whole = trained("whole")
    batches_left = iter(range(8))
    with pytest.raises(StopIteration):
        trained("cut", on_batch=lambda: next(batches_left))
    resumed = trained("cut")
    assert resumed[1:] == whole[1:]
    for one, other in zip(
        resumed.critic.modules().values(), whole.critic.modules().values(), strict=True
    ):
        states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)


def test_a_trained_critic_is_a_better_start_and_is_not_changed() -> None:
    encoder = telling()
    start = train_critic(encoder, images(200, 7), SMALL, attack=None, seed=3).critic
    before = [v.clone() for side in start.modules().values() for v in side.state_dict().values()]
    few = replace(SMALL, epochs=1, learning_rate=1e-4)
    means = []
    for given in (None, start):
        found = train_critic(encoder, images(100, 0), few, attack=None, seed=0, start=given)
        tested = evaluate_critic(encoder, found.critic, images(100, 1), few, attack=None)
        means.append(mean_of(tested.values))
    assert means[1] > means[0] + 0.1
    after = [v for side in start.modules().values() for v in side.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("bound", ["dv", "infonce", "nwj", "smile"])
def test_all_shifts_are_all_negative_pairs(bound: str) -> None:
    z, h = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, 5, dtype=torch.float64)
    stats = module.sampled_stats(z, h, range(1, 7))
    assert isinstance(stats, CriticStats)
    found = module.BOUNDS[bound](stats=stats)
    assert found == pytest.approx(module.BOUNDS[bound](z, h).item(), rel=1e-12)


def test_few_negatives_are_scaled_to_all() -> None:
    z, h = torch.randn(7, 5), torch.randn(7, 3, 5)
    found = module.sampled_stats(z, h, [2, 5])
    T = reference.scores(z, h)
    own = torch.stack([T[i, [(i + 2) % 7, (i + 5) % 7]] for i in range(7)])
    wanted = own.logsumexp(1) + math.log(3)
    assert torch.allclose(found.lse, wanted, atol=1e-5)


def test_sampled_negatives_train_and_stay_the_same_within_an_attack() -> None:
    config = replace(SMALL, negatives=3)
    found = train_critic(telling(), images(100, 0), config, attack=None, seed=0)
    tested = evaluate_critic(telling(), found.critic, images(100, 1), config, attack=ATTACK)
    assert mean_of(tested.values) < tested.trace[0]
    shifts = module.negative_shifts(config, 20)
    assert shifts is not None
    assert len(set(shifts)) == 3
    assert all(1 <= shift <= 19 for shift in shifts)


def test_vectors_have_a_critic_too() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    encoder = nn.Identity()
    config = replace(SMALL, batch_size=50)
    found = train_critic(encoder, x[:200], config, attack=None, seed=0)
    assert mean_of(evaluate_critic(encoder, found.critic, x[200:], config, attack=None).values) > 1


def test_no_finite_value() -> None:
    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] / 0

    with pytest.raises(FloatingPointError, match="no batch of stage 'critic' had a finite value"):
        train_critic(Infinite(), images(100, 0), replace(SMALL, epochs=1), attack=None, seed=0)


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(ValueError, match="batch_size is 20, wanted 1 to n = 10"):
        train_critic(Constant(), images(10, 0), SMALL, attack=None, seed=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bound": "jsd"}, "CriticConfig: bound is 'jsd', wanted one of"),
        ({"batch_size": 1}, "CriticConfig: batch_size is 1, wanted 2 or more"),
        ({"negatives": 0}, "CriticConfig: negatives is 0, wanted None or 1 to 99"),
        ({"negatives": 100}, "CriticConfig: negatives is 100, wanted None or 1 to 99"),
        ({"critic_grad": "half"}, "CriticConfig: critic_grad is 'half', wanted 'full'"),
    ],
)
def test_settings_that_are_none(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CriticConfig(**options)
