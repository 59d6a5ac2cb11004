"""torch.compile of whole objectives, encoder and critic included, as one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from networks import images
from torch import Tensor, nn

from wcmi_fast import PGD, functional
from wcmi_fast.models import BaselineH, DotCritic, GlobalCritic, LocalCritic

SHAPE, DIM, UNITS = (1, 8, 8), 4, 16
BOUNDS = {"dv": functional.dv, "jsd": functional.jsd, "infonce": functional.infonce}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Sides(nn.Module):
    """The two critics, called as DotCritic is."""

    def __init__(self) -> None:
        super().__init__()
        self.global_, self.local = GlobalCritic(DIM, units=UNITS), LocalCritic(SHAPE, units=UNITS)

    def forward(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.global_(g), self.local(x)


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "two sides": Sides,
    "fused": lambda: DotCritic(DIM, SHAPE, units=UNITS),
}


def networks(name: str) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([BaselineH(SHAPE, dim=DIM), CRITICS[name]()]).double()


def batch(seed: int) -> Tensor:
    # In float64, because batch statistics of few values make float32 gradients ill-conditioned.
    return images(6, *SHAPE, seed=seed).double()


def objective(networks: nn.ModuleList) -> Callable[[Tensor], list[Tensor]]:
    encoder, critic = networks

    def values(x: Tensor) -> list[Tensor]:
        z, h = critic(encoder(x), x)
        return [bound(z, h) for bound in BOUNDS.values()]

    return values


def forward_and_backward(
    program: Callable[[Tensor], list[Tensor]], weights: list[Tensor], x: Tensor
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    x = x.clone().requires_grad_()
    values = program(x)
    total = sum((k + 1) * value for k, value in enumerate(values))
    return [value.detach() for value in values], torch.autograd.grad(total, [x, *weights])


def check(name: str, backend: str, *, training: bool) -> None:
    ours = networks(name).train(training)
    same = copy.deepcopy(ours)
    compiled = torch.compile(objective(ours), fullgraph=True, backend=backend)
    for seed in (0, 1):
        x = batch(seed)
        found = forward_and_backward(compiled, list(ours.parameters()), x)
        wanted = forward_and_backward(objective(same), list(same.parameters()), x)
        torch.testing.assert_close(found, wanted)
        assert found[1][0].abs().max() > 1e-3
    for (key, a), b in zip(ours.named_buffers(), same.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    assert ours[0].convolutions[1].num_batches_tracked == (2 if training else 0)


@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("training", [False, True])
def test_one_graph(name: str, training: bool) -> None:
    check(name, "aot_eager", training=training)


@pytest.mark.slow
@pytest.mark.parametrize("name", CRITICS)
def test_one_graph_with_inductor(name: str) -> None:
    check(name, "inductor", training=True)


@pytest.mark.parametrize("triangular", [False, True])
def test_one_graph_with_a_frozen_view(triangular: bool) -> None:
    encoder, critic = networks("fused").eval().requires_grad_(False)
    view = critic.frozen(triangular=triangular)

    def values(x: Tensor) -> list[Tensor]:
        z, h = view(encoder(x), x)
        return [bound(z, h) for bound in BOUNDS.values()]

    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")
    x = batch(0)
    torch.testing.assert_close(
        forward_and_backward(compiled, [], x), forward_and_backward(values, [], x)
    )


def test_an_attack_on_a_compiled_loss() -> None:
    encoder, critic = networks("two sides").eval().requires_grad_(False)

    def loss_fn(x: Tensor) -> Tensor:
        return -functional.dv(*critic(encoder(x), x))

    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    attack, x = PGD(eps=0.2, step_size=0.05, steps=3), batch(0)
    torch.testing.assert_close(attack.attack(compiled, x), attack.attack(loss_fn, x))
