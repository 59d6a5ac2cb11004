"""Critics of many neurons at once: trained, attacked and evaluated, each as if it were alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Adam

from wcmi_fast import functional, reference
from wcmi_fast.data import Feed, batches
from wcmi_fast.information.critic import Attack, CriticConfig
from wcmi_fast.information.patches import PatchNeurons
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded
from wcmi_fast.training.stage import run_epochs

# Neurons that a CPU attacks together: the inner maps of their patches then stay in its cache.
CPU_GROUP = 16


class PatchCritics(nn.Module):
    """M critics of image patches, h_k(x) = v . relu(W x + b) + s . x + c, that share nothing.

    Args:
        neurons: (M,), int64: whose they are. A critic's first weights depend on its neuron and the
            seed, and not on the others.
        inputs: number of a patch's values.
        units: size of the hidden layer.
        seed: parts of the seed.
    """

    def __init__(
        self, neurons: Tensor, inputs: int, units: int, seed: Sequence[object] = ()
    ) -> None:
        super().__init__()
        self.register_buffer("neurons", neurons)
        shapes = {"W": (inputs, units), "b": (1, units), "v": (units, 1), "s": (inputs, 1)}
        rows: dict[str, list[Tensor]] = {name: [] for name in shapes}
        for neuron in neurons.tolist():
            with seeded(*seed, neuron):
                for name, shape in shapes.items():
                    reach = (units if name == "v" else inputs) ** -0.5
                    rows[name].append(torch.empty(shape).uniform_(-reach, reach))
        for name, weights in rows.items():
            self.register_parameter(name, nn.Parameter(torch.stack(weights)))
        self.c = nn.Parameter(torch.zeros(len(neurons), 1))

    def forward(self, patches: Tensor, part: slice = slice(None)) -> Tensor:
        """Return h (M', N) of patches (1, N, C, R, R), or (M', N, C, R, R), by M' of the critics.

        Args:
            patches: floating point; one set for all the critics, or one for each.
            part: which critics.
        """
        x = patches.flatten(2)
        W, b, v, s = (self.get_parameter(name)[part] for name in ("W", "b", "v", "s"))
        h: Tensor = (torch.relu(x @ W + b) @ v + x @ s)[..., 0] + self.c[part]
        return h


def neuron_bounds(z: Tensor, h: Tensor) -> Tensor:
    """Return the dv bound (M,), in nats, of M neurons' scores T_k[i, j] = z[k, i] * h[k, j].

    Args:
        z, h: (M, N), float32 or float64.

    Equivalent torch program, for one neuron::

        T = z[:, None] * h[None]; off = ~torch.eye(N, dtype=torch.bool)
        T.diagonal().mean() - T[off].logsumexp(0) + math.log(N * (N - 1))
    """
    n = z.shape[1]
    stats = functional.critic_stats(scores=z.t()[:, None] * h.t()[None], which=("dv",))
    lse: Tensor = stats.lse  # type: ignore[assignment]
    return stats.positives.mean(0) - reference.logsumexp(lse, 0) + math.log(n * (n - 1))


def train_neuron_critics(
    layer: PatchNeurons,
    neurons: Tensor,
    x: Feed,
    config: CriticConfig,
    *,
    attack: Attack | None,
    seed: int,
    stage: str,
    run: RunFolder | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> PatchCritics:
    """Train a critic for each neuron by ascent on dv; keep that of the neuron's best batch.

    Args:
        layer: the neurons, on the device of x.
        neurons: (M,), int64: which of them.
        x: training images (N, C, H, W); a batch has a patch of each of its images.
        config: the settings; units are those of the hidden layer.
        attack: lowers each neuron's value on patches of its own before the step; None for plain
            information.
        seed: decides weights and patches.
        stage: name under which checkpoints and metrics go; a part of the seed.
        run: folder for a checkpoint after every epoch; an interrupted stage goes on there.
        on_batch: called after every batch.

    Raises:
        ValueError: fewer images than one batch.
        FloatingPointError: no batch of a neuron had a finite value.

    Source: Zhu et al. 2020, supplement B, algorithm 2.
    """
    inputs = layer.field.size**2 * x.shape[1]
    critics = PatchCritics(neurons, inputs, config.units, (seed, stage, "weights")).to(x.device)
    best = _Best(critics)
    optimizer = Adam(critics.parameters(), lr=config.learning_rate, fused=True)
    per_epoch = len(x) // config.batch_size

    def train_epoch(epoch: int, generator: torch.Generator) -> dict[str, float]:
        values = []
        for batch, indices in enumerate(batches(len(x), config.batch_size, generator)):
            done = (epoch * per_epoch + batch) / (config.epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = config.learning_rate * _cosine(done)
            value = _batch_values(layer, critics, x[indices], attack, config.critic_grad)
            best.take_(critics, value.detach())  # before the step: the values are these weights'
            optimizer.zero_grad(set_to_none=True)
            (-value.sum()).backward()
            optimizer.step()
            values.append(value.detach().mean())
            on_batch()
        return {"bound_nats": float(torch.stack(values).mean())}

    modules = {"critics": critics, "best": best}
    run_epochs(run, stage, seed, config.epochs, modules, optimizer, train_epoch)
    lost = neurons[best.values.isinf().cpu()].tolist()
    if lost:
        raise FloatingPointError(
            f"train_neuron_critics: no batch of stage {stage!r} had a finite value for neurons "
            f"{lost}; try a lower learning_rate"
        )
    return best.critics.requires_grad_(False)


@torch.no_grad()
def evaluate_neuron_critics(
    layer: PatchNeurons,
    critics: PatchCritics,
    x: Feed,
    config: CriticConfig,
    *,
    attack: Attack | None,
    seed: int,
    on_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the values of equal batches (batches, M), in nats, each neuron's attacked if asked.

    Args:
        layer, config, attack, on_batch: as for `train_neuron_critics`.
        critics: as that returns them.
        x: test images; an incomplete last batch is left out.
        seed: decides which patch of an image is taken; all critics get the same ones.
    """
    values = []
    with seeded(seed, "evaluation"):
        for indices in batches(len(x), config.batch_size):
            values.append(_batch_values(layer, critics, x[indices], attack, config.critic_grad))
            on_batch()
    return torch.stack(values).cpu().double()


def _batch_values(
    layer: PatchNeurons,
    critics: PatchCritics,
    images: Tensor,
    attack: Attack | None,
    critic_grad: CriticGrad,
) -> Tensor:
    """Return the neurons' values (M,) on a patch of each image, attacked if asked."""
    where = torch.randint(layer.locations, (len(images),)).to(images.device)
    patches = layer.patches(images, where)[None]
    if attack is not None:
        patches = _attacked(layer, critics, patches, where, attack, critic_grad)
    with torch.no_grad():
        z = layer(patches, where, critics.get_buffer("neurons"))
    return neuron_bounds(z, critics(patches))


def _attacked(
    layer: PatchNeurons,
    critics: PatchCritics,
    patches: Tensor,
    where: Tensor,
    attack: Attack,
    critic_grad: CriticGrad,
) -> Tensor:
    """Return patches (M, N, C, R, R), each neuron's attacked through its own loss alone."""
    neurons, inside = critics.get_buffer("neurons"), layer.inside(where)
    group = CPU_GROUP if patches.device.type == "cpu" else len(neurons)
    # encoder_only drops the gradient of the critic's image side.
    image_side = nullcontext() if critic_grad == "full" else torch.no_grad()

    def attacked(part: slice) -> Tensor:
        def loss_fn(x: Tensor) -> Tensor:
            # What lies outside the image has no gradient here, so it stays 0.
            x = x * inside
            with image_side:
                h = critics(x, part)
            return -neuron_bounds(layer(x, where, neurons[part]), h)

        origin = patches.repeat(len(neurons[part]), 1, 1, 1, 1)
        return attack.attack(loss_fn, origin) * inside

    firsts = range(0, len(neurons), group)
    return torch.cat([attacked(slice(first, first + group)) for first in firsts])


class _Best(nn.Module):
    """Each neuron's critic of its best batch so far; a module, so that checkpoints hold it."""

    values: Tensor

    def __init__(self, critics: PatchCritics) -> None:
        super().__init__()
        self.critics = copy.deepcopy(critics)
        self.register_buffer("values", torch.full_like(critics.c[:, 0], -math.inf))

    @torch.no_grad()
    def take_(self, critics: PatchCritics, values: Tensor) -> None:
        """Copy the critics whose values (M,) are their best."""
        better = (values > self.values) & values.isfinite()
        self.values.copy_(torch.where(better, values, self.values))
        for kept, new in zip(self.critics.parameters(), critics.parameters(), strict=True):
            kept.copy_(torch.where(better.view(-1, *[1] * (kept.dim() - 1)), new, kept))


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))
