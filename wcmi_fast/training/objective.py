"""What an encoder ascends: a bound on information by a critic, and the attack's loss."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from wcmi_fast import functional
from wcmi_fast.functional.bounds import MEASURES
from wcmi_fast.functional.ema import EMAState
from wcmi_fast.models import GlobalCritic, LocalCritic, Normalise
from wcmi_fast.training.config import CriticGrad, EncoderConfig

Bound = Callable[[Tensor, Tensor], Tensor]
BOUNDS: dict[str, Callable[..., Tensor]] = {
    "dv": functional.dv,
    "dv_authors": partial(functional.dv, diagonal="zero"),
    "infonce": functional.infonce,
    "nwj": functional.nwj,
    "smile": partial(functional.smile, tau=5.0),
    "mine": functional.mine,
    "jsd": functional.jsd,
    **{f"fenchel_{name}": partial(functional.fenchel_dual, measure=name) for name in MEASURES},
}
# The terms of the objective.
PLAIN, WORST = "information", "worst_case"


@dataclass(frozen=True)
class Critic:
    """Both sides of T[i, j, p] = <global_(g(x_i)), local(x_j)_p>."""

    global_: nn.Module
    local: nn.Module

    def to(self, device: torch.device) -> Critic:
        """Return both sides on a device."""
        return Critic(self.global_.to(device), self.local.to(device))

    def modules(self) -> dict[str, nn.Module]:
        """Return both sides by name."""
        return {"global_critic": self.global_, "local_critic": self.local}


def information_loss(
    encoder: nn.Module,
    critic: Critic,
    bound: Bound,
    critic_grad: CriticGrad,
    critic_refresh: int = 1,
) -> Callable[[Tensor], Tensor]:
    """Return the attacker's loss x -> -bound, in nats, for one run of an attack.

    See `EncoderConfig` for critic_grad and critic_refresh. A new one is needed for every batch:
    it keeps the image side of the critic between refreshes.
    """
    if critic_grad == "full":
        return lambda x: -bound(critic.global_(encoder(x)), critic.local(x))
    kept: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        step = len(kept)
        stale = step == 0 or (critic_refresh > 0 and step % critic_refresh == 0)
        with torch.no_grad():
            kept.append(critic.local(x) if stale else kept[-1])
        return -bound(critic.global_(encoder(x)), kept[-1])

    return loss


def new_critic(
    dim: int,
    units: int,
    input_shape: tuple[int, int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Critic:
    """Build an untrained critic of U = units for representations of size dim.

    With a mean or std its image side begins with (x - mean) / std, as in the authors' code.
    """
    local: nn.Module = LocalCritic(input_shape, units=units).to(memory_format=torch.channels_last)
    if mean is not None or std is not None:
        normalise = Normalise("new_critic", input_shape, mean, std)
        local = nn.Sequential(OrderedDict(normalise=normalise, critic=local))
    return Critic(GlobalCritic(dim, units=units), local)


def weights_of_terms(config: EncoderConfig) -> dict[str, float]:
    """Return the weights in the objective of the terms that are computed."""
    if config.attack is None:
        return {PLAIN: 1.0}
    weights = {WORST: config.beta, PLAIN: 1 - config.beta}
    return {term: weight for term, weight in weights.items() if weight}


def modules_of(critics: Mapping[str, Critic]) -> dict[str, nn.Module]:
    """Return the critics' sides by name; those of a second critic are called plain."""
    first, *others = critics.values()
    named = first.modules()
    for other in others:
        named |= {f"plain_{name}": side for name, side in other.modules().items()}
    return named


def ascended(name: str) -> Bound:
    """Return a bound for training; mine with a moving average of its own."""
    if name not in BOUNDS:
        raise ValueError(f"train_encoder: bound is {name!r}, wanted one of {tuple(BOUNDS)}")
    return partial(BOUNDS[name], ema_state=EMAState()) if name == "mine" else BOUNDS[name]
