"""What the attack of an encoder's training is worth, and whether training learned to defeat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from wcmi_fast.attacks import PGD
from wcmi_fast.distributed import ranks
from wcmi_fast.models.folding import folded
from wcmi_fast.training.config import EncoderConfig
from wcmi_fast.training.objective import BOUNDS, Critic, attacked_bound, attackers_loss

# A finer attack has so many times the steps, each so many times shorter: what is trained against
# long steps can learn to bend the bound between them.
FINER = 4
# Where a finer attack takes so many times what the attack of training takes, and so much at least
# (nats, or the bound's unit), that attack is defeated. It was 1.2 times or less
# for encoders of Fashion-MNIST that had not learned that, and 11 for one that had.
DEFEATED, LEAST = 2.0, 0.1


def strength(
    config: EncoderConfig, attack: PGD, encoder: nn.Module, critic: Critic, images: Tensor
) -> dict[str, float]:
    """Measure how far an attack lowers the bound of a batch, all modules in eval mode.

    Args:
        config: what the encoder is trained for.
        attack: the attack, at its present radius.
        encoder, critic: as they are.
        images: (N, C, H, W), in [0, 1].

    Returns:
        "probe_clean", "probe_attacked" and "probe_finer", the last under `FINER` times the steps,
        each so many times shorter, none of which is spared an evaluation of the image side; in nats
        (or the bound's unit). If config.critic_refresh spares the attack evaluations of the image
        side: "refresh_lost", how much lower the same attack comes that spares none.
    """
    fixed, sides = folded(encoder), Critic(folded(critic.global_), folded(critic.local))
    bound = BOUNDS[attacked_bound(config)]

    @torch.no_grad()
    def value(x: Tensor) -> Tensor:
        return bound(sides.global_(fixed(x)), sides.local(x))

    # A loss keeps the image side between an attack's steps, so that each attack has its own.
    def under(attack: PGD, refresh: int | None) -> Tensor:
        loss_fn = attackers_loss(config, bound, encoder, critic, refresh=refresh)
        return value(attack.attack(loss_fn, images))

    finer = replace(attack, steps=FINER * attack.steps, step_size=attack.step_size / FINER)
    values = {
        "probe_clean": value(images),
        "probe_attacked": under(attack, None),
        "probe_finer": under(finer, 1),
    }
    if config.critic_grad == "encoder_only" and config.critic_refresh != 1:
        values["refresh_lost"] = under(attack, 1)
    # A GPU is waited for once.
    found = dict(zip(values, torch.stack(tuple(values.values())).tolist(), strict=True))
    if "refresh_lost" in found:
        found["refresh_lost"] = found["probe_attacked"] - found["refresh_lost"]
    return found


def defeated(found: Mapping[str, float]) -> bool:
    """Whether what `strength` found says that training has learned to defeat its attack."""
    taken, possible = (
        found["probe_clean"] - found[name] for name in ("probe_attacked", "probe_finer")
    )
    return possible > max(DEFEATED * taken, LEAST)


class Probe(nn.Module):
    """The attack's strength after every epoch, and the end it may bring; checkpoints hold that.

    Args:
        measure: tells what `strength` finds after so many epochs.
        stop: end the stage where the attack is defeated, instead of warning only.
        where: what is trained, for the warning.
    """

    ended: Tensor

    def __init__(
        self, measure: Callable[[int], Mapping[str, float]], *, stop: bool, where: str
    ) -> None:
        super().__init__()
        self.register_buffer("ended", torch.tensor(False))
        self._measure, self._stop, self._where = measure, stop, where

    def after_epoch(self, epoch: int) -> Mapping[str, float]:
        """Measure, and warn of an attack that is defeated."""
        found = self._measure(epoch)
        if defeated(found):
            self.ended.fill_(self._stop)
            ranks.warn(self._sentence(found, epoch))
        return found

    def _sentence(self, found: Mapping[str, float], epoch: int) -> str:
        clean, attacked, finer = (found[f"probe_{name}"] for name in ("clean", "attacked", "finer"))
        return (
            f"{self._where}: the attack of training lowers a batch's bound from {clean:.2f} to "
            f"{attacked:.2f} in epoch {epoch}, and one of {FINER} times the steps, each {FINER} "
            f"times shorter, to {finer:.2f}: the encoder has learned to defeat the first. Try a "
            "smaller step_size, more steps or a lower learning_rate"
        )
