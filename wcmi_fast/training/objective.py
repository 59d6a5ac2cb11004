"""What an encoder ascends: a bound on information by a critic, and the attack's loss."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from wcmi_fast import functional
from wcmi_fast.functional.bounds import MEASURES, CriticStats
from wcmi_fast.functional.ema import EMAState
from wcmi_fast.models import GlobalCritic, LocalCritic, Normalise
from wcmi_fast.models.folding import folded
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

    @property
    def locations(self) -> int:
        """P of the features."""
        return self.convolving.locations

    @property
    def convolving(self) -> LocalCritic:
        """The image side, behind what normalises images."""
        return next(part for part in self.local.modules() if isinstance(part, LocalCritic))

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


def share_convolutions_(critic: Critic, encoder: nn.Module) -> None:
    """Let the image side see through the encoder's first convolutions instead of its own.

    Source: Hjelm et al. 2019, figure 3.
    """
    local, shared = critic.convolving, encoder.get_submodule("convolutions")
    local.convolutions = nn.Sequential(*list(shared.children())[: len(local.convolutions)])


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


class Mine(nn.Module):
    """The bound mine with its moving average in a buffer, so that a checkpoint holds it.

    Args:
        locations: P of the features.
    """

    log_mean: Tensor

    def __init__(self, locations: int) -> None:
        super().__init__()
        self._state = EMAState()
        self.register_buffer("log_mean", torch.full((locations,), torch.nan))

    def forward(
        self, z: Tensor | None = None, h: Tensor | None = None, *, stats: CriticStats | None = None
    ) -> Tensor:
        """Return the bound of z (N, U) and h (N, P, U), or of stats, and move the average."""
        begun = not bool(self.log_mean.isnan().any())
        self._state.log_mean = self.log_mean if begun else None
        value = functional.mine(z, h, stats=stats, ema_state=self._state)
        if self._state.log_mean is not None:
            self.log_mean = self._state.log_mean
        return value


def ascended(name: str, locations: int) -> Bound:
    """Return a bound for training on features of P = locations."""
    if name not in BOUNDS:
        raise ValueError(f"train_encoder: bound is {name!r}, wanted one of {tuple(BOUNDS)}")
    return Mine(locations) if name == "mine" else BOUNDS[name]


def attackers_loss(
    config: EncoderConfig,
    bound: Bound,
    encoder: nn.Module,
    critic: Critic,
    *,
    refresh: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """Return the attacker's loss for one batch, with today's weights; see `information_loss`.

    Args:
        config: critic_grad and critic_refresh.
        bound: that of `attacked_bound`.
        encoder, critic: as they are trained; copies in eval mode are attacked.
        refresh: in the place of config.critic_refresh.
    """
    return information_loss(
        folded(encoder),
        Critic(folded(critic.global_), folded(critic.local)),
        bound,
        config.critic_grad,
        config.critic_refresh if refresh is None else refresh,
    )


def attacked_bound(config: EncoderConfig) -> str:
    """Return the name of the bound that attacks lower: mine's value is dv's."""
    return "dv" if config.bound == "mine" else config.bound
