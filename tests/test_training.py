from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from probes import NO_ATTACK
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wcmi_fast import PGD, functional, reference
from wcmi_fast.models import BaselineH, MLPHead
from wcmi_fast.models.folding import folded
from wcmi_fast.training import encoder as encoder_module
from wcmi_fast.training.config import EncoderConfig, HeadConfig
from wcmi_fast.training.encoder import train_encoder
from wcmi_fast.training.evaluation import accuracy, interval
from wcmi_fast.training.objective import BOUNDS, Critic, information_loss, new_critic
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.stage import OnBatch, Values
from wcmi_fast.training.supervised import train_head

SHAPE = (1, 8, 8)
ATTACK = PGD(eps=0.1, step_size=0.05, steps=2)
SMALL = EncoderConfig(attack=ATTACK, dim=4, units=8, epochs=3, batch_size=8)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(3))


def two_kinds(n: int) -> tuple[Tensor, Tensor]:
    """Bright and dark images, which any head can tell apart."""
    labels = torch.arange(n) % 2
    noise = 0.2 * torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(5))
    return noise + 0.7 * labels.view(-1, 1, 1, 1), labels


def weights(*modules: nn.Module) -> list[Tensor]:
    return [value for module in modules for value in module.state_dict().values()]


def train(config: EncoderConfig, x: Tensor, folder: Path, **kwargs: object) -> list[Tensor]:
    encoder, critic = train_encoder(config, x, seed=0, stage="e", run=RunFolder(folder), **kwargs)  # type: ignore[arg-type]
    return weights(encoder, critic.global_, critic.local)


def product(z: Tensor, h: Tensor) -> Tensor:
    return (z[:, :4] * h).sum()


class KilledError(Exception):
    pass


def kill_after(batches: int) -> OnBatch:
    left = [batches]

    def on_batch(values: Values) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KilledError

    return on_batch


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 5])
def test_a_killed_encoder_run_goes_on_bit_for_bit(
    batches: int, images: Tensor, tmp_path: Path
) -> None:
    whole = train(SMALL, images, tmp_path / "whole")
    with pytest.raises(KilledError):
        train(SMALL, images, tmp_path / "cut", on_batch=kill_after(batches))
    resumed = train(SMALL, images, tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["epoch"] for line in logs[0].splitlines()] == [1, 2, 3]


def test_a_killed_head_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = BaselineH(SHAPE, dim=4).eval()
    x, y = two_kinds(32)
    config = HeadConfig(attack=ATTACK, epochs=3, batch_size=8)

    def head(folder: str, **kwargs: Callable[[], None]) -> list[Tensor]:
        run = RunFolder(tmp_path / folder)
        trained = train_head(config, encoder, x, y, classes=2, seed=0, stage="h", run=run, **kwargs)
        return weights(trained)

    whole = head("whole")
    with pytest.raises(KilledError):
        head("cut", on_batch=kill_after(6))
    resumed = head("cut")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_torn_metrics_line_is_dropped(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(SMALL, images, tmp_path, on_batch=kill_after(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "e", "epo')
    train(SMALL, images, tmp_path)
    assert [record["epoch"] for record in RunFolder(tmp_path).metrics()] == [1, 2, 3]


def test_training_raises_the_bound(images: Tensor, tmp_path: Path) -> None:
    config = replace(SMALL, attack=None, epochs=12)
    train(config, images, tmp_path)
    values = [record["bound_nats"] for record in RunFolder(tmp_path).metrics()]
    assert values[-1] > values[0] + 0.1


def test_weights_averages_and_seed(images: Tensor, tmp_path: Path) -> None:
    last = train(replace(SMALL, averaging=0.0), images, tmp_path / "last")
    averaged = train(SMALL, images, tmp_path / "averaged")
    again = train(SMALL, images, tmp_path / "again")
    assert any(not torch.equal(a, b) for a, b in zip(last, averaged, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(averaged, again, strict=True))


def test_the_global_random_state_is_left(images: Tensor, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(SMALL, images, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("critic_grad", "critic_refresh", "sides"),
    [("full", 1, (1, 1)), ("encoder_only", 1, (1, 0)), ("encoder_only", 0, (1, 0))],
)
def test_critic_grad_decides_which_side_the_attack_sees(
    critic_grad: str, critic_refresh: int, sides: tuple[int, int], images: Tensor
) -> None:
    torch.manual_seed(0)
    encoder = BaselineH(SHAPE, dim=4).eval()
    critic = new_critic(4, 8, SHAPE)
    critic = Critic(critic.global_.eval(), critic.local.eval())
    bound = partial(functional.dv, impl="reference")
    loss_fn = information_loss(encoder, critic, bound, critic_grad, critic_refresh)
    x = images.clone().requires_grad_()
    z_side, h_side = (side.detach() for side in (critic.global_(encoder(x)), critic.local(x)))
    z_only = -reference.dv(reference.scores(critic.global_(encoder(x)), h_side))
    h_only = -reference.dv(reference.scores(z_side, critic.local(x)))
    (wanted,) = torch.autograd.grad(sides[0] * z_only + sides[1] * h_only, x)
    value = loss_fn(x)
    (found,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value, z_only)


@pytest.mark.parametrize(("refresh", "fresh"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (0, [0])])
def test_critic_refresh_counts_the_image_sides(
    refresh: int, fresh: list[int], images: Tensor
) -> None:
    seen: list[float] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(float(x.flatten()[0]))
            return x.flatten(1)[:, :4]

    critic = Critic(nn.Identity(), Counting())
    loss_fn = information_loss(nn.Flatten(), critic, product, "encoder_only", refresh)
    for step in range(4):
        loss_fn(torch.full((2, *SHAPE), float(step)).requires_grad_())
    assert seen == [float(step) for step in fresh]


def test_eps_and_step_grow_in_the_warm_up(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[float, float]] = []
    original = PGD.attack

    def spy(self: PGD, *args: object, **kwargs: object) -> Tensor:
        used.append((self.eps, self.step_size))
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(PGD, "attack", spy)
    monkeypatch.setattr(encoder_module, "strength", lambda *given: NO_ATTACK)
    train(replace(SMALL, eps_warmup=0.5), images, tmp_path)
    done = [step / 6 for step in range(6)]
    wanted = [0.1 * min(1.0, part / 0.5) for part in done]
    assert [eps for eps, _ in used] == pytest.approx(wanted)
    assert [step for eps, step in used if eps > 0] == pytest.approx([w / 2 for w in wanted if w])


def test_head_and_accuracy_on_separable_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    x, y = two_kinds(64)
    config = HeadConfig(attack=None, epochs=10, batch_size=16, learning_rate=1e-2)
    head = train_head(config, encoder, x, y, classes=2, seed=0, stage="h", run=RunFolder(tmp_path))
    assert accuracy(encoder, head, x, y, attack=None) == 1.0
    assert accuracy(encoder, head, x, 1 - y, attack=None) == 0.0
    # An attack that may turn bright into dark images leaves nothing right.
    anything = PGD(eps=1.0, step_size=0.3, steps=10)
    assert accuracy(encoder, head, x, y, attack=anything, batch_size=10) < 0.5


def test_accuracy_attacks_each_image_by_its_own_loss() -> None:
    torch.manual_seed(0)
    encoder, head = BaselineH(SHAPE, dim=4).eval(), MLPHead(4, 3).eval()
    x, y = torch.rand(30, *SHAPE), torch.randint(3, (30,))
    attack = PGD(eps=0.3, step_size=0.1, steps=3)
    x_adv = attack.attack(lambda v: cross_entropy(head(encoder(v)), y, reduction="none"), x)
    wanted = (head(encoder(x_adv)).argmax(1) == y).float().mean().item()
    assert accuracy(encoder, head, x, y, attack=attack, batch_size=7) == pytest.approx(wanted)


@pytest.mark.parametrize(("right", "images"), [(8, 10), (632, 1000), (0, 20), (20, 20)])
def test_the_interval_has_the_shares_that_are_1_96_errors_away(right: int, images: int) -> None:
    share = right / images
    for end in interval(share, images):
        error = math.sqrt(end * (1 - end) / images)
        assert abs(end - share) == pytest.approx(1.959964 * error, rel=1e-5, abs=1e-9)
    low, high = interval(share, images)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_no_gradient_reaches_the_frozen_encoder(tmp_path: Path) -> None:
    encoder = BaselineH(SHAPE, dim=4).train()
    before = [value.clone() for value in weights(encoder)]
    x, y = two_kinds(16)
    config = HeadConfig(attack=ATTACK, epochs=1, batch_size=8)
    train_head(config, encoder, x, y, classes=2, seed=0, stage="h", run=RunFolder(tmp_path))
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(encoder), strict=True))
    assert encoder.training


def test_a_bound_that_is_not_finite_stops_with_place_and_advice(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BOUNDS, "dv", lambda z, h: (z.sum() + h.sum()) * math.nan)
    with pytest.raises(FloatingPointError, match=r"nan in stage 'e', epoch 0, batch 0; try a low"):
        train(replace(SMALL, attack=None), images, tmp_path)


def test_an_unwritable_output_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the output folder .*/file/run cannot be made"):
        RunFolder(tmp_path / "file" / "run")


@pytest.mark.parametrize("build", [lambda: BaselineH(SHAPE, dim=4), lambda: MLPHead(64, 3)])
def test_folded_computes_what_eval_mode_computes(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = build()
    x = torch.rand(12, *SHAPE) if isinstance(module, BaselineH) else torch.rand(12, 64)
    for _ in range(3):
        module(x * torch.rand(()))
    before = [value.clone() for value in weights(module)]
    snapshot = folded(module)
    assert module.training
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))
    wanted = module.eval()(x)
    assert (wanted - module.train()(x)).abs().max() > 1e-3
    torch.testing.assert_close(snapshot(x), wanted, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in snapshot.modules())
    assert not any(parameter.requires_grad for parameter in snapshot.parameters())
