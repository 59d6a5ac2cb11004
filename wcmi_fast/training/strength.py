"""What the attack of an encoder's training is worth, on a batch that is not trained on then."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wcmi_fast.attacks import PGD
from wcmi_fast.models.folding import folded
from wcmi_fast.training.config import EncoderConfig
from wcmi_fast.training.objective import BOUNDS, Critic, attacked_bound, attackers_loss


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
        "probe_clean" and "probe_attacked", in nats (or the bound's unit). If config.critic_refresh
        spares the attack evaluations of the image side: "refresh_lost", how much lower the same
        attack comes that spares none.
    """
    fixed, sides = folded(encoder), Critic(folded(critic.global_), folded(critic.local))
    bound = BOUNDS[attacked_bound(config)]

    @torch.no_grad()
    def value(x: Tensor) -> float:
        return bound(sides.global_(fixed(x)), sides.local(x)).item()

    attacked = value(attack.attack(attackers_loss(config, bound, encoder, critic), images))
    found = {"probe_clean": value(images), "probe_attacked": attacked}
    if config.critic_grad == "encoder_only" and config.critic_refresh != 1:
        exact = attack.attack(attackers_loss(config, bound, encoder, critic, refresh=1), images)
        found["refresh_lost"] = attacked - value(exact)
    return found
