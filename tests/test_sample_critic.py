"""The training of two samples' critics, written out again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from wcmi_fast import reference
from wcmi_fast.information import sample_critic
from wcmi_fast.information.sample_critic import SampleConfig
from wcmi_fast.information.towers import new_tower

CONFIG = SampleConfig(
    units=3,
    width=8,
    members=1,
    steps=30,
    batch_size=30,
    learning_rate=1e-2,
    weight_decay=0.5,
)


def rows() -> tuple[Tensor, Tensor]:
    """Return 100 rows of x and z that have information."""
    x, noise = torch.randn(2, 100, 2, generator=torch.Generator().manual_seed(3))
    return x, 0.8 * x + 0.6 * noise


def scores(towers: nn.ModuleList, x: Tensor, z: Tensor) -> Tensor:
    """T, row z[i] and column x[j]: features' products and both offsets."""
    of_x, of_z = towers[0](x), towers[1](z)
    products = of_z[:, :-1] @ of_x[:, :-1].T
    return (products + of_x[:, -1] + of_z[:, -1:])[:, :, None]


def joint(T: Tensor) -> Tensor:
    return (reference.dv(T) + reference.infonce(T)) / 2


def mine() -> Callable[[Tensor], Tensor]:
    """Return dv, whose log term is differentiated by a running mean of exp(T)."""
    seen: list[Tensor] = []

    def objective(T: Tensor) -> Tensor:
        mean = reference.log_mean_exp(T).exp()
        seen.append(mean.detach() if not seen else 0.99 * seen[-1] + 0.01 * mean.detach())
        return reference.positive_scores(T).mean() - (mean / seen[-1]).mean()

    return objective


def written_out(
    config: SampleConfig, objective: Callable[[Tensor], Tensor]
) -> dict[int, nn.ModuleList]:
    """Return the running averages of the weights after step 24 and the last."""
    x, z = rows()
    generator = torch.Generator().manual_seed(7)
    fold = torch.randperm(100, generator=generator)
    fitted = fold[20:]
    x, z = x[fitted], z[fitted]
    towers = nn.ModuleList(new_tower((2,), config.units, config.width) for _ in range(2))
    averaged = copy.deepcopy(towers)
    fast = [p for tower in towers for p in tower.linear_weights()]  # type: ignore[operator]
    slow = [p for p in towers.parameters() if all(p is not each for each in fast)]
    optimizer = torch.optim.AdamW(
        [
            {"params": slow, "lr": config.learning_rate},
            {"params": fast, "lr": 3 * config.learning_rate},
        ],
        weight_decay=config.weight_decay,
    )
    steps = config.steps
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
    )
    found: dict[int, nn.ModuleList] = {}
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < config.batch_size:
            order = torch.randperm(80, generator=generator)
        batch, order = order[: config.batch_size], order[config.batch_size :]
        optimizer.zero_grad()
        (-objective(scores(towers, x[batch], z[batch]))).backward()
        optimizer.step()
        cosine.step()
        decay = min(config.averaging, (1 + step) / (10 + step))
        with torch.no_grad():
            for old, new in zip(averaged.parameters(), towers.parameters(), strict=True):
                old.copy_(decay * old + (1 - decay) * new)
        if step in (24, steps - 1):
            found[step] = copy.deepcopy(averaged)
    return found


# The average's decay begins small; of these it reaches the first, and stays below the second.
@pytest.mark.parametrize(("training", "averaging"), [("joint", 0.6), ("mine", 0.97)])
def test_a_critic_is_trained_as_its_settings_say(training: str, averaging: float) -> None:
    """AdamW along a cosine, batches without replacement, and weights averaged as they go."""
    config = replace(CONFIG, averaging=averaging)
    torch.manual_seed(1)
    advanced: list[float] = []
    generator = torch.Generator().manual_seed(7)
    critic = sample_critic.train(rows(), training, config, generator, advanced.append)
    (found,) = critic.members
    assert sum(advanced) == config.steps
    torch.manual_seed(1)
    wanted = written_out(config, joint if training == "joint" else mine())
    judge = joint if training == "joint" else reference.dv
    curve = [judge(scores(each, *found.checked)).item() for each in wanted.values()]
    assert found.curve == pytest.approx(curve, abs=1e-4)
    best = max(wanted, key=lambda step: curve[list(wanted).index(step)])
    assert found.best_step == best
    # But for a constant, which has no gradient but that of rounding.
    T, given = (scores(towers, *rows()) for towers in (wanted[best], found.towers))
    torch.testing.assert_close(given - given.mean(), T - T.mean(), atol=1e-3, rtol=1e-3)


def test_a_batch_is_no_larger_than_the_rows() -> None:
    config = replace(CONFIG, batch_size=1000, steps=3)
    critic = sample_critic.train(
        rows(), "joint", config, torch.Generator().manual_seed(7), lambda steps: None
    )
    assert len(critic.members[0].curve) == 1
