"""What encoders are trained for: I - beta RV, by each bound."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from probes import NO_ATTACK
from torch import Tensor, nn

from wcmi_fast import PGD
from wcmi_fast.training import checkpoint
from wcmi_fast.training import encoder as encoder_module
from wcmi_fast.training.config import EncoderConfig
from wcmi_fast.training.encoder import new_encoder, train_encoder
from wcmi_fast.training.objective import BOUNDS, Critic, new_critic
from wcmi_fast.training.run_folder import RunFolder

ATTACK = PGD(eps=0.2, step_size=0.1, steps=2)
SMALL = EncoderConfig(attack=ATTACK, dim=4, units=8, epochs=2, batch_size=8)


def images(n: int = 24) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def trained(config: EncoderConfig, folder: Path) -> list[Tensor]:
    encoder, critic = train_encoder(config, images(), seed=0, stage="e", run=RunFolder(folder))
    modules = (encoder, critic.global_, critic.local)
    return [value for module in modules for value in module.state_dict().values()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def modules_of(folder: Path) -> set[str]:
    newest = max((folder / "checkpoints" / "e").iterdir())
    tensors, _ = checkpoint.load(newest)
    return {name.split(".")[0] for name in tensors}


def test_beta_0_is_plain_information(tmp_path: Path) -> None:
    plain = trained(replace(SMALL, attack=None), tmp_path / "plain")
    assert equal(trained(replace(SMALL, beta=0.0), tmp_path / "0"), plain)
    assert not equal(trained(SMALL, tmp_path / "1"), plain)


def test_beta_1_computes_no_plain_term(tmp_path: Path) -> None:
    trained(SMALL, tmp_path)
    assert not any("plain" in name for name in modules_of(tmp_path))


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_another_beta_has_two_critics(beta: float, tmp_path: Path) -> None:
    trained(replace(SMALL, beta=beta), tmp_path)
    assert {"plain_global_critic", "plain_local_critic"} <= modules_of(tmp_path)


def gradients(beta: float, tmp_path: Path) -> tuple[dict[str, list[Tensor]], Any]:
    """Return the gradients of the first step, by module, before they are clipped."""
    # The attack moves nothing at a radius of 0, so that both terms see the same images.
    config = replace(SMALL, beta=beta, attack=replace(ATTACK, eps=0.0))
    seen: dict[str, list[Tensor]] = {}
    made: list[nn.Module] = []
    real_encoder, real_critic = new_encoder, new_critic

    def encoder(*given: Any) -> nn.Module:
        made.append(real_encoder(*given))
        return made[-1]

    def critic(*given: Any) -> Critic:
        found = real_critic(*given)
        made.append(nn.ModuleDict(found.modules()))
        return found

    class StopError(Exception):
        pass

    def clip(weights: Any, most: float) -> None:
        names = ["encoder", "worst_case", "information"][: len(made)]
        for name, module in zip(names, made, strict=True):
            seen[name] = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        raise StopError

    with (
        mock.patch.object(encoder_module, "new_encoder", encoder),
        mock.patch.object(encoder_module, "new_critic", critic),
        mock.patch.object(nn.utils, "clip_grad_norm_", clip),
        pytest.raises(StopError),
    ):
        trained(config, tmp_path)
    return seen, made


@pytest.mark.parametrize("beta", [0.25, 3.0])
def test_each_critic_ascends_fully_and_the_encoder_by_the_weights(
    beta: float, tmp_path: Path
) -> None:
    seen, made = gradients(beta, tmp_path)
    encoder, *critics = made
    terms = []
    x = None
    for module in critics:
        # The same step, written out: each term's own gradient.
        encoder.zero_grad()
        module.zero_grad()
        x = images() if x is None else x
        batch = x[first_batch()]
        z = encoder(batch)
        value = BOUNDS["dv"](module["global_critic"](z), module["local_critic"](batch))
        (-value).backward()
        terms.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
        name = ("worst_case", "information")[len(terms) - 1]
        own = [p.grad for p in module.parameters() if p.grad is not None]
        torch.testing.assert_close(seen[name], own, rtol=1e-3, atol=1e-5)
    wanted = [beta * w + (1 - beta) * n for w, n in zip(*terms, strict=True)]
    torch.testing.assert_close(seen["encoder"], wanted, rtol=1e-3, atol=1e-5)


def first_batch() -> Tensor:
    from wcmi_fast.data import batches
    from wcmi_fast.training.seeds import seeded

    with seeded(0, "e", 0) as generator:
        return next(iter(batches(24, 8, generator)))


@pytest.mark.parametrize(
    "bound",
    [
        name if name == "dv" else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(BOUNDS)
    ],
)
def test_every_bound_rises(bound: str, tmp_path: Path) -> None:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(6, 1, 1, 1)
    x = (x + 0.05 * images()).clamp(0, 1)
    config = replace(
        SMALL,
        bound=bound,
        beta=0.5,  # both terms
        epochs=8,
        learning_rate=3e-3,
        attack=replace(ATTACK, eps=0.01),
    )
    run = RunFolder(tmp_path)
    train_encoder(config, x, seed=0, stage="e", run=run)
    values = [record["bound_nats"] for record in run.metrics()]
    assert all(map(math.isfinite, values))
    assert max(values[-3:]) > values[0]


def test_the_attack_lowers_the_worst_case_term_only(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    real = PGD.attack

    def attack(self: PGD, loss_fn: Any, x: Tensor, **options: Any) -> Tensor:
        seen.append(real(self, loss_fn, x, **options))
        return seen[-1]

    inputs: list[Tensor] = []

    def record(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if module.training:
            inputs.append(given[0].clone())

    real_encoder = new_encoder

    def encoder(*given: Any) -> nn.Module:
        made = real_encoder(*given)
        made.register_forward_pre_hook(record)
        return made

    with (
        mock.patch.object(PGD, "attack", attack),
        mock.patch.object(encoder_module, "new_encoder", encoder),
        mock.patch.object(encoder_module, "strength", return_value=NO_ATTACK),
    ):
        trained(replace(SMALL, beta=0.5, epochs=1, eps_warmup=0.0), tmp_path)
    assert len(seen) == 3
    assert len(inputs) == 6
    for attacked, first, second in zip(seen, inputs[::2], inputs[1::2], strict=True):
        assert torch.equal(first, attacked)
        assert 0.1 < float((second - attacked).abs().max()) <= 0.2 + 1e-6


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
def test_a_beta_that_is_no_weight(beta: float) -> None:
    with pytest.raises(ValueError, match=f"EncoderConfig: beta is {beta}, wanted a finite number"):
        replace(SMALL, beta=beta)


def test_a_bound_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_encoder: bound is 'dw', wanted one of"):
        trained(replace(SMALL, bound="dw"), tmp_path)
