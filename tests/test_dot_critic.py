"""DotCritic and its frozen view against the critic as the authors write it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from authors import PlainDotCritic, copied
from networks import assert_twice_as_good_together, images, randomised
from torch import Tensor, nn

from wcmi_fast import functional
from wcmi_fast.models import DotCritic, FrozenCritic, GlobalCritic, LocalCritic, dot_critic

SHAPE, DIM, N = (2, 9, 11), 6, 5


def critic(
    units: int = 20, convolutions: int = 2, shape: tuple[int, int, int] = SHAPE
) -> DotCritic:
    made = randomised(DotCritic(DIM, shape, units=units, convolutions=convolutions))
    assert isinstance(made, DotCritic)
    return made


def inputs(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> tuple[Tensor, Tensor]:
    return images(N, DIM, seed=seed) - 0.5, images(N, *shape, seed=seed + 1)


def plain_of(ours: DotCritic) -> nn.Module:
    widths = (64, 128, 256)[: len(ours.local.convolutions) // 3]
    return copied(PlainDotCritic(DIM, ours.local.input_shape[0], ours.local.units, widths), ours)


Scores = Callable[[Tensor, Tensor], Tensor]


def scores_and_grads(scores: Scores, g: Tensor, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    g, x = g.clone().requires_grad_(), x.clone().requires_grad_()
    T = scores(g, x)
    direction = torch.linspace(-3, 3, T.numel(), dtype=T.dtype).view_as(T).sin()
    found = torch.autograd.grad((T * direction).mean(), [g, x, *weights])
    return [T.detach(), *found]


def compare(ours: DotCritic) -> None:
    """Scores, all gradients and the running statistics, in training or eval mode as `ours` is."""
    names = ["T", "g", "x", *(name for name, _ in ours.named_parameters())]
    names += [name for name, _ in ours.named_buffers()]
    draws = []
    for seed in range(6):
        network = copy.deepcopy(ours)
        plain = plain_of(network).train(ours.training)
        exact = copy.deepcopy(plain).double()
        g, x = inputs(seed=seed)
        found = scores_and_grads(network.scores, g, x, list(network.parameters()))
        same = scores_and_grads(plain, g, x, list(plain.parameters()))
        wanted = scores_and_grads(exact, g.double(), x.double(), list(exact.parameters()))
        parts = zip((found, same, wanted), (network, plain, exact), strict=True)
        draws.append(tuple(part + [b.double() for b in module.buffers()] for part, module in parts))
    assert_twice_as_good_together(draws, names)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("units", [5, 15, 16, 40])
@pytest.mark.parametrize("convolutions", [2, 3])
def test_it_is_the_module_with_convolutions(training: bool, units: int, convolutions: int) -> None:
    compare(critic(units, convolutions).train(training))


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_over_several_batches(momentum: float | None) -> None:
    ours = critic().train()
    plain = plain_of(ours).train()
    for network in (ours, plain):
        for part in network.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.momentum = momentum
                part.reset_running_stats()
    exact = copy.deepcopy(plain).double()
    for seed in range(3):
        g, x = inputs(seed=seed)
        ours.scores(g, x), plain(g, x), exact(g.double(), x.double())
    buffers = [[b.double() for b in network.buffers()] for network in (ours, plain, exact)]
    assert_twice_as_good_together(
        [(buffers[0], buffers[1], buffers[2])], [name for name, _ in ours.named_buffers()]
    )


def test_batch_statistics_of_inputs_far_from_zero() -> None:
    """The variance must not be lost beside the square of the mean, nor be negative."""
    ours = critic().train()
    with torch.no_grad():
        ours.local.convolutions[-2].bias.fill_(300.0)  # type: ignore[union-attr]
        ours.local.convolutions[-2].weight.fill_(0.1)  # type: ignore[union-attr]
    compare(ours)


def test_the_weights_are_those_of_the_two_critics() -> None:
    ours = critic()
    sides = GlobalCritic(DIM, units=20), LocalCritic(SHAPE, units=20)
    sides[0].load_state_dict(ours.global_.state_dict())
    sides[1].load_state_dict(ours.local.state_dict())
    g, x = inputs()
    for module in (ours, *sides):
        module.eval()
    T = torch.einsum("iu,jpu->ijp", sides[0](g), sides[1](x))
    torch.testing.assert_close(ours.scores(g, x), T)
    assert ours.locations == sides[1].locations == 4


def test_the_bounds_take_its_features() -> None:
    ours = critic().eval()
    g, x = inputs()
    value = functional.dv(*ours(g, x))
    torch.testing.assert_close(value, functional.dv(scores=plain_of(ours).eval()(g, x)))
    frozen = ours.frozen()
    torch.testing.assert_close(functional.dv(*frozen(g, x)), value)


def test_one_row_has_no_variance() -> None:
    ours = DotCritic(DIM, (1, 4, 4), units=8).train()
    ours.local.convolutions.eval()
    with pytest.raises(ValueError, match="1 row in training mode, wanted 2 or more"):
        ours.x_side(torch.zeros(1, 1, 4, 4))


# ---- the frozen view ----------------------------------------------------------------------------


@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("block", [3, 8, 128])
@pytest.mark.parametrize(("units", "convolutions"), [(5, 3), (15, 2), (16, 2), (40, 2)])
def test_the_view_is_the_module_in_eval_mode(
    triangular: bool, block: int, units: int, convolutions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = critic(units, convolutions).train()
    monkeypatch.setattr(dot_critic, "FACTOR_BLOCK", block)
    monkeypatch.setattr(dot_critic, "BLOCK_ROWS", 4 * block)
    check_view(ours, ours.frozen(triangular=triangular))
    assert ours.training


def check_view(ours: DotCritic, view: FrozenCritic) -> None:
    plain = plain_of(ours).eval()
    exact = copy.deepcopy(plain).double()
    draws = []
    for seed in range(4):
        g, x = inputs(ours.local.input_shape, seed)
        found = scores_and_grads(view.scores, g, x, [])
        same = scores_and_grads(plain, g, x, [])
        wanted = scores_and_grads(exact, g.double(), x.double(), [])
        with torch.no_grad():
            scores = view.scores(g, x)
        draws.append(([*found, scores], [*same, same[0]], [*wanted, wanted[0]]))
    assert_twice_as_good_together(draws, ["T", "g", "x", "T without gradients"])


def test_the_view_by_default_at_the_size_where_it_is_triangular() -> None:
    ours = critic(dot_critic.TRIANGULAR_UNITS)
    view = ours.frozen()
    assert len(view._factor) > 1
    check_view(ours, view)
    assert critic(8).frozen()._k is None


def test_a_view_of_float64() -> None:
    ours = critic().double().eval()
    g, x = (t.double() for t in inputs())
    torch.testing.assert_close(ours.frozen(triangular=True).scores(g, x), ours.scores(g, x))


def test_the_view_gives_weights_no_gradient() -> None:
    ours = critic()
    g, x = inputs()
    T = ours.frozen().scores(g.requires_grad_(), x)
    T.sum().backward()
    assert g.grad is not None
    assert all(weight.grad is None for weight in ours.parameters())


def test_the_gradient_of_the_view_agrees_with_differences() -> None:
    view = critic(units=4, shape=(1, 4, 4)).double().frozen(triangular=True)
    g = torch.randn(2, DIM, dtype=torch.float64, requires_grad=True)
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(view.scores, (g, x))


def optimiser_step(ours: DotCritic) -> None:
    ours.scores(*inputs()).sum().backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()


def replace_parameter(ours: DotCritic) -> None:
    block = ours.local.block
    block.norm.weight = nn.Parameter(block.norm.weight.detach().clone())


def write_data(ours: DotCritic) -> None:
    ours.global_.block.shortcut.weight.data[0, 0] += 1.0


def running_statistics(ours: DotCritic) -> None:
    ours.train().x_side(inputs()[1])


CHANGES = {
    "an optimiser's step": optimiser_step,
    "load_state_dict": lambda ours: ours.load_state_dict(critic().state_dict()),
    "a parameter replaced": replace_parameter,
    "a write through .data": write_data,
    "running statistics": running_statistics,
    "another dtype": lambda ours: ours.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_view_refuses(change: str) -> None:
    ours = critic().train(change == "an optimiser's step")
    g, x = inputs()
    view = ours.frozen()
    view(g, x)
    CHANGES[change](ours)
    sentence = "FrozenCritic: the critic's weights have changed since the view was made, wanted a"
    for use in (lambda: view.z_side(g), lambda: view.x_side(x), lambda: view.scores(g, x)):
        with pytest.raises(RuntimeError, match=sentence):
            use()
    if change != "another dtype":
        ours.frozen()(g, x)


def test_a_view_is_not_stale_after_use_or_a_change_of_mode() -> None:
    ours = critic().train()
    view = ours.frozen()
    g, x = inputs()
    before = view.scores(g, x)
    ours.eval().requires_grad_(False)
    assert torch.equal(view.scores(g, x), before)


def test_a_second_derivative_of_the_view_is_refused() -> None:
    x = inputs()[1]
    h = critic().frozen(triangular=True).x_side(x.requires_grad_())
    with pytest.raises(RuntimeError, match=r"has no second derivative .* wanted DotCritic"):
        torch.autograd.grad(h.sum(), x, create_graph=True)


def test_second_derivatives_of_the_module() -> None:
    ours = critic(units=3, shape=(1, 4, 4)).double().eval()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ours.x_side, (x,))


def test_a_view_made_and_used_in_inference_mode() -> None:
    ours = critic()
    g, x = inputs()
    wanted = ours.eval().scores(g, x)
    with torch.inference_mode():
        view = ours.frozen()
        torch.testing.assert_close(view.scores(g, x), wanted)
    x.requires_grad_()
    view.scores(g, x).sum().backward()
    assert x.grad is not None


def test_a_block_whose_output_is_constant() -> None:
    """A layer norm of nothing but its eps must give finite values and gradients."""
    ours = critic()
    with torch.no_grad():
        for weight in (ours.local.block.shortcut.weight, ours.local.block.nonlinear[3].weight):
            weight.zero_()
        ours.local.block.nonlinear[3].bias.fill_(0.5)
    g, x = inputs()
    for triangular in (False, True):
        view = ours.frozen(triangular=triangular)
        found = scores_and_grads(view.scores, g, x, [])
        assert all(part.isfinite().all() for part in found)
        torch.testing.assert_close(found[0], ours.eval().scores(g, x), atol=1e-4, rtol=1e-4)


def test_copies() -> None:
    ours = critic().eval()
    g, x = inputs()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other.scores(g, x), ours.scores(g, x))


def test_compile_without_graph_breaks() -> None:
    ours = critic().eval()
    g, x = inputs()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(g, x), ours(g, x))


def test_the_features_are_stored_once() -> None:
    """Of the block, nothing of their size is kept for the backward pass but its result."""
    ours = critic(units=256).train()
    x = images(16, *SHAPE)
    rows, kept = 16 * ours.locations, set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 2 and len(tensor) == rows and tensor.shape[1] >= 256:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = ours.x_side(x)
    assert kept == {h.untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda c: c.x_side(torch.zeros(2, 1, 9, 11)), "x has shape (2, 1, 9, 11)"),
        (lambda c: c.z_side(torch.zeros(2, 7)), "g has shape (2, 7)"),
        (lambda c: c.frozen().x_side(torch.zeros(2, 9, 11)), "x has shape (2, 9, 11)"),
        (lambda c: c.frozen().z_side(torch.zeros(7)), "g has shape (7,)"),
    ],
)
def test_bad_shapes(call: Callable[[DotCritic], object], sentence: str) -> None:
    with pytest.raises(ValueError, match="wanted") as caught:
        call(critic())
    assert sentence in str(caught.value)


def test_a_view_of_half_weights_is_refused() -> None:
    with pytest.raises(TypeError, match=r"weights have dtype torch.bfloat16, wanted one of"):
        critic().bfloat16().frozen()
