from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from authors import PlainGlobalCritic, PlainLocalCritic, copied
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CIFAR, MNIST, ByLocation, assert_twice_as_good, images, randomised
from torch import Tensor, nn

from wcmi_fast.models import (
    BaselineH,
    GlobalCritic,
    LinearHead,
    LocalCritic,
    MLPHead,
    OneByOneBlock,
)


def compare(ours: nn.Module, plain: nn.Module, x: Tensor, *, training: bool) -> None:
    """Compare values, input gradients and running statistics with a plain network."""
    ours, plain = ours.train(training), copied(plain, ours).train(training)
    exact = copy.deepcopy(plain).double()
    results = []
    for network, v in ((ours, x), (plain, x), (exact, x.double())):
        v = v.clone().requires_grad_()
        y = network(v)
        (grad,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), v)
        results.append((y, grad))
    assert_twice_as_good(*(y for y, _ in results))
    assert_twice_as_good(*(grad for _, grad in results))
    for a, b, c in zip(ours.buffers(), plain.buffers(), exact.buffers(), strict=True):
        assert_twice_as_good(a, b, c.double())


def plain_baseline(channels: int, flat: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 64, 4, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 4, 2, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 256, 4, 2, 1, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, 1024),
        nn.BatchNorm1d(1024),
        nn.ReLU(),
        nn.Linear(1024, dim),
    )


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("training", [False, True])
class TestAgainstPlainTorch:
    @pytest.mark.parametrize(("shape", "flat"), [(MNIST, 2304), (CIFAR, 4096), ((2, 9, 17), 512)])
    def test_baseline_h(self, shape: tuple[int, int, int], flat: int, training: bool) -> None:
        ours = randomised(BaselineH(shape, dim=10))
        compare(ours, plain_baseline(shape[0], flat, 10), images(5, *shape), training=training)

    @pytest.mark.parametrize("shape", [MNIST, CIFAR, (2, 9, 17)])
    @pytest.mark.parametrize("widths", [(64, 128), (64, 128, 256)])
    def test_local_critic(
        self, shape: tuple[int, int, int], widths: tuple[int, ...], training: bool
    ) -> None:
        ours = randomised(LocalCritic(shape, units=20, convolutions=len(widths)))
        plain = ByLocation(PlainLocalCritic(shape[0], 20, widths))
        compare(ours, plain, images(3, *shape), training=training)

    @pytest.mark.parametrize("units", [5, 48])
    def test_global_critic(self, units: int, training: bool) -> None:
        ours = randomised(GlobalCritic(12, units=units))
        compare(
            ours,
            nn.Sequential(PlainGlobalCritic(12, units), nn.Flatten()),
            images(7, 12),
            training=training,
        )

    def test_linear_head(self, training: bool) -> None:
        compare(randomised(LinearHead(12, 5)), nn.Linear(12, 5), images(7, 12), training=training)

    def test_mlp_head(self, training: bool) -> None:
        plain = nn.Sequential(
            nn.Linear(12, 30), nn.Dropout(0.0), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5)
        )
        ours = randomised(MLPHead(12, 5, hidden=30, dropout=0.0))
        compare(ours, plain, images(7, 12), training=training)


class TestBaselineH:
    @pytest.mark.parametrize(
        ("shape", "count"),
        # By hand: 16 (64 C + 8192 + 32768) + 2 (64 + 128 + 256 + 1024) + FC 1024 + FC 64.
        [
            (MNIST, 656_384 + 2_944 + 2_360_320 + 65_600),
            (CIFAR, 658_432 + 2_944 + 4_195_328 + 65_600),
        ],
    )
    def test_number_of_parameters(self, shape: tuple[int, int, int], count: int) -> None:
        encoder = BaselineH(shape)
        assert parameters(encoder) == count
        assert (encoder.input_shape, encoder.dim) == (shape, 64)

    def test_features_are_flattened_as_c_h_w(self) -> None:
        encoder = randomised(BaselineH(MNIST)).eval()
        x = images(2, *MNIST)
        maps = encoder.convolutions(x)
        rows = [maps[:, c, i, j] for c in range(256) for i in range(3) for j in range(3)]
        expected = encoder.output(encoder.hidden(torch.stack(rows, dim=1)))
        torch.testing.assert_close(encoder(x), expected)

    def test_nothing_follows_the_last_layer(self) -> None:
        encoder = randomised(BaselineH(MNIST)).eval()
        with torch.no_grad():
            encoder.output.weight.zero_()
            encoder.output.bias.copy_(torch.linspace(-3, 3, 64))
        assert torch.equal(encoder(images(2, *MNIST))[1], torch.linspace(-3, 3, 64))


class TestCritics:
    @pytest.mark.parametrize(
        ("convolutions", "last", "kernels"), [(2, 128, 8192), (3, 256, 8192 + 32768)]
    )
    def test_number_of_parameters(self, convolutions: int, last: int, kernels: int) -> None:
        critic = LocalCritic(CIFAR, units=300, convolutions=convolutions)
        norms = 2 * sum((64, 128, 256)[:convolutions])
        block = 2 * 300 * last + 300 * 300 + 5 * 300  # bias, batch norm and LayerNorm
        assert parameters(critic) == 16 * (64 * 3 + kernels) + norms + block
        assert parameters(GlobalCritic(64)) == 2 * 2048 * 64 + 2048**2 + 5 * 2048
        assert (critic.units, LocalCritic(MNIST, units=4).input_shape) == (300, MNIST)

    @pytest.mark.parametrize(("shape", "locations"), [(MNIST, 49), (CIFAR, 64)])
    def test_locations_of_the_paper(self, shape: tuple[int, int, int], locations: int) -> None:
        critic = LocalCritic(shape, units=3)
        assert critic.locations == locations
        assert critic(images(2, *shape)).shape == (2, locations, 3)

    @pytest.mark.parametrize(
        ("row", "column", "reached"),
        # Location (r, c) sees rows 4 r - 3 to 4 r + 6, and columns alike; p = 7 r + c.
        [(0, 27, [6]), (27, 0, [42]), (2, 12, [2, 3, 9, 10]), (7, 0, [7, 14])],
    )
    def test_locations_are_in_row_major_order(
        self, row: int, column: int, reached: list[int]
    ) -> None:
        critic = randomised(LocalCritic(MNIST, units=16)).eval()
        x = images(1, *MNIST)
        moved = x.clone()
        moved[0, 0, row, column] += 1
        changed = (critic(moved) - critic(x)).abs().amax(-1)[0] > 1e-6
        assert changed.nonzero().flatten().tolist() == reached

    @pytest.mark.parametrize(("inputs", "units"), [(6, 200), (200, 6), (40, 40)])
    def test_shortcut_starts_near_the_identity(self, inputs: int, units: int) -> None:
        torch.manual_seed(0)
        weight = OneByOneBlock(inputs, units).shortcut.weight.detach()
        on_diagonal = torch.eye(units, inputs, dtype=torch.bool)
        assert weight[on_diagonal].tolist() == [1.0] * min(inputs, units)
        rest = weight[~on_diagonal]
        assert rest.abs().max() <= 0.01
        assert rest.std().item() == pytest.approx(0.02 / 12**0.5, rel=0.05)
        assert abs(rest.mean().item()) < 0.001

    def test_features_are_normalised_over_units(self) -> None:
        h = LocalCritic(MNIST, units=32)(images(4, *MNIST))
        torch.testing.assert_close(h.mean(-1), torch.zeros(4, 49), atol=1e-5, rtol=0)
        torch.testing.assert_close(h.square().mean(-1), torch.ones(4, 49), atol=1e-2, rtol=0)


class TestHeads:
    def test_number_of_parameters(self) -> None:
        assert parameters(MLPHead(64, 10)) == 65 * 200 + 2 * 200 + 201 * 10
        assert parameters(LinearHead(64, 10)) == 650

    def test_dropout_comes_before_batch_norm(self) -> None:
        head = randomised(MLPHead(12, 5, hidden=30, dropout=0.4)).train()
        linear, _, norm, _, last = head.layers
        g = images(16, 12)
        torch.manual_seed(3)
        found = head(g)
        torch.manual_seed(3)
        dropped = nn.functional.dropout(linear(g), 0.4)
        assert 0.3 < (dropped == 0).float().mean() < 0.5
        torch.testing.assert_close(found, last(torch.relu(norm(dropped))))


@pytest.mark.parametrize(
    "build",
    [
        lambda shape: BaselineH(shape, dim=6),
        lambda shape: LocalCritic(shape, units=6),
        lambda shape: LocalCritic(shape, units=6, convolutions=3),
    ],
)
@pytest.mark.parametrize("shape", [MNIST, CIFAR])
def test_channels_last_images(
    build: Callable[[tuple[int, int, int]], nn.Module], shape: tuple[int, int, int]
) -> None:
    network = randomised(build(shape)).eval()
    x = images(3, *shape)
    expected, exact = network(x), copy.deepcopy(network).double()(x.double())
    channels_last = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = channels_last(x.contiguous(memory_format=torch.channels_last))
    assert_twice_as_good(found, expected, exact)


@settings(max_examples=15, deadline=None)
@given(
    channels=st.integers(1, 4),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    convolutions=st.sampled_from([2, 3]),
)
def test_shapes_are_accepted_where_the_convolutions_leave_a_location(
    channels: int, height: int, width: int, convolutions: int
) -> None:
    shape, smallest = (channels, height, width), 2**convolutions
    if min(height, width) < smallest:
        with pytest.raises(ValueError, match=f"wanted H and W of at least {smallest}, because"):
            LocalCritic(shape, units=2, convolutions=convolutions)
        return
    critic = LocalCritic(shape, units=2, convolutions=convolutions).eval()
    maps = critic.convolutions(images(1, *shape))
    assert critic.locations == maps[0, 0].numel()
    assert critic(images(1, *shape)).shape == (1, maps[0, 0].numel(), 2)


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: BaselineH((1, 7, 28)), ValueError, r"BaselineH: input_shape is \(1, 7, 28\), wan"),
        (lambda: BaselineH((28, 28)), ValueError, r"input_shape is \(28, 28\), wanted \(C, H, W"),
        (lambda: BaselineH((0, 28, 28)), ValueError, "BaselineH: input_shape is 0, wanted a posit"),
        (lambda: BaselineH(MNIST, dim=0), ValueError, "BaselineH: dim is 0, wanted a positive int"),
        (lambda: BaselineH(MNIST, dim=6.0), TypeError, "BaselineH: dim is 6.0, wanted a positive"),
        (
            lambda: LocalCritic(MNIST, units=-1),
            ValueError,
            "LocalCritic: units is -1, wanted a pos",
        ),
        (
            lambda: LocalCritic(MNIST, convolutions=4),
            ValueError,
            "convolutions is 4, wanted 2 or 3",
        ),
        (lambda: GlobalCritic(0), ValueError, "GlobalCritic: dim is 0, wanted a positive integer"),
        (lambda: GlobalCritic(4, units=True), TypeError, "GlobalCritic: units is True, wanted"),
        (lambda: OneByOneBlock(0, 2), ValueError, "OneByOneBlock: inputs is 0, wanted a positive"),
        (lambda: MLPHead(64, 0), ValueError, "MLPHead: classes is 0, wanted a positive integer"),
        (lambda: MLPHead(64, 2, hidden=0), ValueError, "MLPHead: hidden is 0, wanted a positive"),
        (lambda: MLPHead(64, 2, dropout=1.5), ValueError, "MLPHead: dropout is 1.5, wanted a prob"),
        (lambda: LinearHead(0, 2), ValueError, "LinearHead: dim is 0, wanted a positive integer"),
    ],
)
def test_bad_sizes(build: Callable[[], nn.Module], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build()


@pytest.mark.parametrize(
    ("network", "shape", "sentence"),
    [
        (BaselineH(MNIST), (2, 3, 28, 28), r"BaselineH: x has .* 28\), wanted \(N, 1, 28, 28\)"),
        (BaselineH(MNIST), (1, 28, 28), r"BaselineH: x has shape \(1, 28, 28\), wanted \(N, 1, 28"),
        (LocalCritic(CIFAR, units=2), (2, 3, 28, 28), r"LocalCritic: .*wanted \(N, 3, 32, 32\)"),
        (GlobalCritic(8, units=2), (3, 7), r"GlobalCritic: g has shape \(3, 7\), wanted \(N, 8\)"),
        (OneByOneBlock(8, 2), (2, 3, 8), r"OneByOneBlock: rows has shape \(2, 3, 8\), wanted \(N"),
        (MLPHead(8, 2), (8,), r"MLPHead: g has shape \(8,\), wanted \(N, 8\)"),
        (LinearHead(8, 2), (3, 9), r"LinearHead: g has shape \(3, 9\), wanted \(N, 8\)"),
    ],
)
def test_bad_inputs(network: nn.Module, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        network(torch.zeros(shape))
