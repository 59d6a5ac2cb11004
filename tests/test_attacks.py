from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import plain_l2_step, plain_linf_start
from torch import Tensor, nn

from wcmi_fast.attacks import PGD, _starts_generator, frozen


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    # By way of float64, because float32 random numbers are multiples of 2**-24 and round too well.
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


def small_net() -> nn.Sequential:
    """A network in which mode, weights, buffers and random numbers all matter."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
    )
    net.append(nn.Linear(3 * 4 * 4, 5))
    net(images(16, 1, 6, 6, seed=9))  # running statistics that differ from the initial ones
    return net


def wavy(x: Tensor) -> Tensor:
    """One loss per image, with many local maxima."""
    return (torch.sin(40 * x) + 0.5 * torch.sin(97 * x + 1)).flatten(1).sum(1)


def coupled(x: Tensor) -> Tensor:
    """A loss in which every image's gradient depends on all others."""
    rows = x.flatten(1)
    scores = rows @ rows.sin().t()
    return scores.diagonal().mean() - scores.flatten().logsumexp(0)


class TestIterates:
    def test_a_linear_loss_reaches_exactly_the_corner(self) -> None:
        x = images(4, 1, 5, 5)
        w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        w[:, :, 0] = 0  # sgn(0) = 0: these pixels stay
        eps = 0.3
        corner = torch.where(w > 0, x + eps, torch.where(w < 0, x - eps, x)).clamp(0, 1)
        x_adv = PGD(eps=eps, step_size=0.1, steps=4).attack(lambda v: (w * v).sum(), x)
        assert torch.equal(x_adv, corner)
        assert not torch.equal(x_adv, x)

    @pytest.mark.parametrize("coupled_loss", [False, True])
    @pytest.mark.parametrize("clip", [(0.0, 1.0), (0.1, 0.8)])
    def test_equals_ten_lines_of_torch_bitwise(
        self, coupled_loss: bool, clip: tuple[float, float]
    ) -> None:
        net = small_net().eval()
        y = torch.arange(7) % 5
        x = images(7, 1, 6, 6).clamp(*clip)

        def loss_fn(v: Tensor) -> Tensor:
            if coupled_loss:
                return coupled(net(v))
            return nn.functional.cross_entropy(net(v), y, reduction="none")

        expected = x.clone()
        for _ in range(6):
            expected.requires_grad_()
            (grad,) = torch.autograd.grad(loss_fn(expected).sum(), expected)
            with torch.no_grad():
                expected = expected + 0.03 * grad.sign()
                expected = torch.clamp(expected, x - 0.1, x + 0.1).clamp(*clip)
        attack = PGD(eps=0.1, step_size=0.03, steps=6, clip=clip)
        assert torch.equal(attack.attack(loss_fn, x, modules=[net]), expected)
        assert loss_fn(expected).sum() > loss_fn(x).sum()

    def test_nan_gradient_leaves_its_pixel(self) -> None:
        w = torch.tensor([1.0, math.nan, -1.0])
        x = torch.full((2, 3), 0.5)
        x_adv = PGD(eps=0.25, step_size=0.125, steps=1).attack(lambda v: (w * v).sum(), x)
        assert x_adv.tolist() == [[0.625, 0.5, 0.375]] * 2

    def test_modules_run_in_eval_mode(self) -> None:
        net = small_net().train()
        attack = PGD(eps=0.1, step_size=0.03, steps=3)
        x = images(7, 1, 6, 6)
        loss_fn: Callable[[Tensor], Tensor] = lambda v: net(v).square().sum(1)  # noqa: E731
        found = attack.attack(loss_fn, x, modules=[net])
        expected = attack.attack(loss_fn, x, modules=[net.eval()])
        assert torch.equal(found, expected)

    def test_eps_zero_returns_x_itself(self) -> None:
        def never(v: Tensor) -> Tensor:
            raise AssertionError

        x = images(2, 3)
        assert PGD(eps=0.0, step_size=0.1, steps=2).attack(never, x) is x

    @settings(max_examples=30, deadline=None)
    @given(
        eps=st.floats(1e-4, 1.0),
        seed=st.integers(0, 10**6),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        random_start=st.booleans(),
    )
    def test_stays_within_the_stated_bound(
        self, eps: float, seed: int, dtype: torch.dtype, random_start: bool
    ) -> None:
        x = images(8, 200, seed=seed, dtype=dtype)
        w = images(8, 200, seed=seed + 1, dtype=dtype) - 0.5
        attack = PGD(eps=eps, step_size=eps, steps=2, random_start=random_start)
        x_adv = attack.attack(lambda v: (w * v).sum(), x)
        difference = (x_adv.double() - x.double()).abs().max().item()
        assert difference <= eps + torch.finfo(dtype).eps / 2
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert difference >= min(eps, 0.5) * (1 - torch.finfo(dtype).eps)

    def test_the_stated_bound_is_nearly_reached(self) -> None:
        # 2**-25 for rounding x + eps, and up to 2**-26 for rounding an eps below 1/2.
        eps = 0.3
        x = images(100, 1000)
        x_adv = PGD(eps=eps, step_size=0.5, steps=1).attack(lambda v: v.sum(), x)
        excess = (x_adv.double() - x.double()).max().item() - eps
        assert 2**-26 < excess <= 2**-24

    @pytest.mark.parametrize("keep", ["last", "best"])
    def test_keeps_dtype_and_memory_format(self, keep: str) -> None:
        x = images(3, 2, 4, 4).double().contiguous(memory_format=torch.channels_last)
        attack = PGD(eps=0.1, step_size=0.1, steps=2, keep=keep)  # type: ignore[arg-type]
        x_adv = attack.attack(wavy, x)
        assert x_adv.dtype == torch.float64
        assert x_adv.stride() == x.stride()
        assert torch.equal(x_adv, attack.attack(wavy, x.contiguous()))

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_works_where_gradients_are_off(self, context: Callable[[], torch.no_grad]) -> None:
        attack = PGD(eps=0.1, step_size=0.04, steps=3, keep="best", random_start=True, restarts=2)
        net = small_net()
        expected = attack.attack(lambda v: net(v).sum(1), images(3, 1, 6, 6), modules=[net])
        with context():
            x = images(3, 1, 6, 6)
            x_adv = attack.attack(lambda v: net(v).sum(1), x, modules=[net])
        assert torch.equal(x_adv, expected)
        assert not x_adv.requires_grad
        assert not x_adv.is_inference()


class TestKeep:
    # Iterates of pixel 0 step over its peak at 0.7 and back; pixel 1 climbs.
    x = torch.tensor([[0.5], [0.5]])
    settings: dict[str, float] = {"eps": 0.5, "step_size": 0.25}  # noqa: RUF012

    @staticmethod
    def per_image(v: Tensor) -> Tensor:
        return torch.stack([-(v[0, 0] - 0.7).abs(), 0.1 * v[1, 0]])

    def attack(self, keep: str, loss_fn: Callable[[Tensor], Tensor], steps: int = 2) -> Tensor:
        attack = PGD(**self.settings, steps=steps, keep=keep)  # type: ignore[arg-type]
        return attack.attack(loss_fn, self.x).flatten()

    def test_last(self) -> None:
        assert self.attack("last", self.per_image).tolist() == [0.5, 1.0]

    def test_best_is_per_image_for_losses_per_image(self) -> None:
        assert self.attack("best", self.per_image).tolist() == [0.75, 1.0]

    def test_best_is_per_batch_for_a_scalar(self) -> None:
        # Sums: -.15 at the start, .025 after one step, -.1 after two.
        assert self.attack("best", lambda v: self.per_image(v).sum()).tolist() == [0.75, 0.75]

    def test_best_may_be_the_start(self) -> None:
        peak = lambda v: -(v - 0.55).abs().sum()  # noqa: E731
        assert self.attack("best", peak, steps=1).tolist() == [0.5, 0.5]
        assert self.attack("last", peak, steps=1).tolist() == [0.75, 0.75]

    def test_best_may_be_the_last(self) -> None:
        assert self.attack("best", lambda v: v.sum(), steps=1).tolist() == [0.75, 0.75]

    @pytest.mark.parametrize("bad_call", [0, 1])
    def test_nan_loss_is_never_best(self, bad_call: int) -> None:
        calls = []

        def loss_fn(v: Tensor) -> Tensor:
            calls.append(v)
            return v.flatten() + (math.nan if len(calls) == bad_call + 1 else 0.0)

        # With a NaN at the start, the last iterate is best; with one at the end, the start is.
        expected = 0.75 if bad_call == 0 else 0.5
        assert self.attack("best", loss_fn, steps=1).tolist() == [expected] * 2


class TestRestarts:
    def restarts(self, loss_fn: Callable[[Tensor], Tensor], keep: str, n: int) -> list[Tensor]:
        """What each of n restarts alone would give: a shared generator gives the same starts."""
        generator = torch.Generator().manual_seed(3)
        attack = PGD(eps=0.2, step_size=0.01, steps=3, keep=keep, random_start=True)  # type: ignore[arg-type]
        return [attack.attack(loss_fn, self.x, generator=generator) for _ in range(n)]

    def together(self, loss_fn: Callable[[Tensor], Tensor], keep: str, n: int) -> Tensor:
        attack = PGD(eps=0.2, step_size=0.01, steps=3, keep=keep, random_start=True, restarts=n)  # type: ignore[arg-type]
        return attack.attack(loss_fn, self.x, generator=torch.Generator().manual_seed(3))

    x = images(12, 1, 3, 3)

    @pytest.mark.parametrize("keep", ["last", "best"])
    def test_the_worst_restart_is_kept_per_image(self, keep: str) -> None:
        alone = torch.stack(self.restarts(wavy, keep, 4))
        worst = torch.stack([wavy(a) for a in alone]).argmax(0)
        assert len(worst.unique()) > 2, "the case must tell the worst restart from the last"
        expected = alone[worst, torch.arange(12)]
        assert torch.equal(self.together(wavy, keep, 4), expected)

    @pytest.mark.parametrize("keep", ["last", "best"])
    def test_the_worst_restart_is_kept_per_batch(self, keep: str) -> None:
        alone = self.restarts(lambda v: wavy(v).sum(), keep, 5)
        worst = max(range(5), key=lambda r: wavy(alone[r]).sum().item())
        assert worst != 4, "the case must tell the worst restart from the last"
        assert torch.equal(self.together(lambda v: wavy(v).sum(), keep, 5), alone[worst])

    @pytest.mark.parametrize(
        ("keep", "restarts", "forwards"),
        [("last", 1, 3), ("best", 1, 4), ("last", 2, 8), ("best", 2, 8)],
    )
    def test_no_wasted_evaluation(self, keep: str, restarts: int, forwards: int) -> None:
        with_grad = []

        def loss_fn(v: Tensor) -> Tensor:
            assert v.requires_grad == torch.is_grad_enabled()
            with_grad.append(v.requires_grad)
            return wavy(v)

        PGD(
            eps=0.2,
            step_size=0.1,
            steps=3,
            keep=keep,
            random_start=True,
            restarts=restarts,  # type: ignore[arg-type]
        ).attack(loss_fn, self.x)
        assert len(with_grad) == forwards
        assert sum(with_grad) == 3 * restarts


class TestRandomStart:
    attack = PGD(eps=0.25, step_size=0.1, steps=1, random_start=True)

    @staticmethod
    def flat(v: Tensor) -> Tensor:
        """A loss whose gradient is 0, so that the result is the start."""
        return (0 * v).sum()

    def test_is_uniform_in_the_ball_and_within_clip(self) -> None:
        x = images(50, 1, 8, 8)
        generator, same = (torch.Generator().manual_seed(5) for _ in range(2))
        key = int(torch.randint(2**63 - 1, (), generator=same))
        seen = []

        def loss_fn(v: Tensor) -> Tensor:
            seen.append(v.clone())
            return self.flat(v)

        start = self.attack.attack(loss_fn, x, generator=generator)
        assert torch.equal(start, seen[0])
        assert torch.equal(start, plain_linf_start(x, 0.25, key, (0, 1)))
        assert torch.equal(generator.get_state(), same.get_state())
        inside = (x > 0.25) & (x < 0.75)
        noise = (start - x)[inside]
        assert noise.std().item() == pytest.approx(0.5 / math.sqrt(12), rel=0.05)

    def test_is_the_same_at_every_call_without_a_generator(self) -> None:
        x = images(3, 1, 4, 4)
        first = self.attack.attack(self.flat, x)
        torch.manual_seed(77)
        assert torch.equal(self.attack.attack(self.flat, x), first)
        seeded = self.attack.attack(self.flat, x, generator=torch.Generator().manual_seed(0))
        assert torch.equal(seeded, first)

    def test_varies_with_a_generator(self) -> None:
        x = images(3, 1, 4, 4)
        generator = torch.Generator().manual_seed(0)
        first = self.attack.attack(self.flat, x, generator=generator)
        second = self.attack.attack(self.flat, x, generator=generator)
        assert ((first - second).abs() > 1e-3).float().mean() > 0.9

    def test_does_not_depend_on_the_memory_format(self) -> None:
        x = images(3, 2, 4, 4)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        found = self.attack.attack(self.flat, channels_last)
        assert torch.equal(found, self.attack.attack(self.flat, x))
        assert found.stride() == channels_last.stride()

    def test_without_it_the_start_is_x(self) -> None:
        x = images(3, 4)
        assert torch.equal(PGD(eps=0.2, step_size=0.1, steps=1).attack(self.flat, x), x)

    def test_generator_on_another_device(self) -> None:
        with pytest.raises(ValueError, match="generator is on cpu, wanted cuda:0, the device of x"):
            _starts_generator(torch.Generator(), torch.device("cuda:0"))


class TestL2:
    """What differs where norm is "l2"."""

    @staticmethod
    def attack(**change: object) -> PGD:
        return PGD(**{"norm": "l2", "eps": 0.5, "step_size": 0.2, "steps": 5, **change})  # type: ignore[arg-type]

    @staticmethod
    def flat(v: Tensor) -> Tensor:
        return (0 * v).sum()

    def test_a_linear_loss_reaches_the_point_of_the_ball_along_its_gradient(self) -> None:
        x = 0.4 + 0.2 * images(4, 1, 8, 8)
        w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        found = self.attack().attack(lambda v: (w * v).sum(), x)
        norms = w.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert (found - (x + 0.5 * w / norms)).abs().max() < 1e-6

    @pytest.mark.parametrize("coupled_loss", [False, True])
    def test_equals_ten_lines_of_torch(self, coupled_loss: bool) -> None:
        net = small_net().eval()
        y = torch.arange(7) % 5
        x, clip = images(7, 1, 6, 6).clamp(0.1, 0.8), (0.1, 0.8)

        def loss_fn(v: Tensor) -> Tensor:
            if coupled_loss:
                return coupled(net(v))
            return nn.functional.cross_entropy(net(v), y, reduction="none")

        expected = x.clone()
        for _ in range(6):
            expected.requires_grad_()
            (grad,) = torch.autograd.grad(loss_fn(expected).sum(), expected)
            expected = plain_l2_step(expected.detach(), grad, x, 0.5, 0.2, clip)
        found = self.attack(steps=6, clip=clip).attack(loss_fn, x, modules=[net])
        assert (found - expected).abs().max() < 1e-5
        assert loss_fn(found).sum() > loss_fn(x).sum()

    @settings(max_examples=50, deadline=None)
    @given(
        eps=st.floats(1e-4, 10.0),
        seed=st.integers(0, 10**6),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        random_start=st.booleans(),
        size=st.sampled_from([1, 3, 200, 1001]),
    )
    def test_stays_within_the_stated_bound(
        self, eps: float, seed: int, dtype: torch.dtype, random_start: bool, size: int
    ) -> None:
        x = images(8, size, seed=seed, dtype=dtype)
        w = images(8, size, seed=seed + 1, dtype=dtype) - 0.5
        attack = self.attack(eps=eps, step_size=eps, steps=2, random_start=random_start)
        x_adv = attack.attack(lambda v: (w * v).sum(), x)
        distance = (x_adv.double() - x.double()).norm(dim=1).max().item()
        assert distance <= eps + size**0.5 * torch.finfo(dtype).eps / 2
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("size", [1, 2, 12])
    def test_the_random_start_is_uniform_in_the_ball(self, size: int, dtype: torch.dtype) -> None:
        x = torch.full((20_000, size), 0.5, dtype=dtype)
        attack = self.attack(eps=0.25, steps=1, random_start=True)
        noise = (attack.attack(self.flat, x).double() - 0.5) / 0.25
        radii = noise.norm(dim=1)
        assert radii.max() <= 1 + 4 * torch.finfo(dtype).eps
        # The D-th power of the radius is uniform: its mean within 5 standard deviations; bfloat16
        # is coarse. Directions balance.
        rounding = 0.02 if dtype == torch.bfloat16 else 0
        bound = 5 / math.sqrt(12 * 20_000) + rounding
        assert (radii**size).mean().item() == pytest.approx(0.5, abs=bound)
        assert (radii**size < 0.1).double().mean().item() == pytest.approx(
            0.1, abs=0.011 + rounding
        )
        assert (noise > 0).double().mean(0).sub(0.5).abs().max() < 0.02
        assert noise.square().mean(0).mul(size + 2).sub(1).abs().max() < 0.06

    def test_the_random_start_is_clipped(self) -> None:
        x = images(50, 64)
        seen = []

        def loss_fn(v: Tensor) -> Tensor:
            seen.append(v.detach().clone())
            return self.flat(v)

        self.attack(eps=3.0, steps=1, random_start=True).attack(loss_fn, x)
        (start,) = seen  # before a step could clip it
        assert start.min() == 0
        assert start.max() == 1
        assert ((start - x).norm(dim=1) <= 3.0).all()

    def test_the_random_start_follows_the_generator(self) -> None:
        x = images(6, 2, 4, 4)
        attack = self.attack(steps=1, random_start=True)
        generator = torch.Generator().manual_seed(0)
        first = attack.attack(self.flat, x, generator=generator)
        assert torch.equal(attack.attack(self.flat, x), first)
        second = attack.attack(self.flat, x, generator=generator)
        assert ((first - second).abs() > 1e-3).float().mean() > 0.8

    def test_the_memory_format_changes_only_the_order_of_sums(self) -> None:
        x = images(3, 2, 4, 4)
        attack = self.attack(random_start=True, keep="best", restarts=2)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        found = attack.attack(wavy, channels_last)
        assert found.stride() == channels_last.stride()
        assert (found - attack.attack(wavy, x)).abs().max() < 1e-5

    def test_keeps_the_best_iterate(self) -> None:
        x = images(12, 9)
        last, best = (self.attack(keep=keep).attack(wavy, x) for keep in ("last", "best"))
        better = wavy(best) > wavy(last)
        assert (wavy(best) >= wavy(last)).all()
        assert better.any()
        assert torch.equal(best[~better], last[~better])

    def test_a_zero_or_nan_gradient_leaves_its_image(self) -> None:
        w = torch.tensor([[1.0, -1.0], [0.0, 0.0], [1.0, math.nan]])
        x = torch.full((3, 2), 0.5)
        found = self.attack(steps=1).attack(lambda v: (w * v).sum(), x)
        assert torch.equal(found[1:], x[1:])
        assert not torch.equal(found[0], x[0])


class LossFailedError(Exception):
    pass


class TestNothingElseChanges:
    def mixed_net(self) -> nn.Sequential:
        """Modes and flags that a blanket train() or requires_grad_(True) would not bring back."""
        net = small_net().train()
        net[1].eval()
        net[0].weight.requires_grad_(False)
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        return net

    @pytest.mark.parametrize("fails", [False, True])
    def test_everything_is_restored(self, fails: bool) -> None:
        net, other = self.mixed_net(), nn.BatchNorm1d(5).train()
        x = images(4, 1, 6, 6).requires_grad_()
        x.grad = torch.full_like(x, 0.25)
        clean = x.detach().clone()
        modes = [m.training for m in net.modules()]
        flags = [p.requires_grad for p in net.parameters()]
        weights = [p.detach().clone() for p in net.parameters()]
        grads = [(p.grad, p.grad.clone()) for p in net.parameters() if p.grad is not None]
        buffers = [(b, b.clone()) for b in net.buffers()]
        rng = torch.get_rng_state()
        calls = []

        def loss_fn(v: Tensor) -> Tensor:
            calls.append(1)
            assert not any(m.training for m in net.modules())
            assert not any(p.requires_grad for p in net.parameters())
            assert other.training
            assert all(p.requires_grad for p in other.parameters())
            torch.rand(3)
            net[1].train()  # running statistics move
            net[1].running_var = net[1].running_var.clone() + 1
            logits = other(net(v))
            if fails and len(calls) == 2:
                raise LossFailedError
            net[1].eval()
            return logits.sum()

        attack = PGD(eps=0.1, step_size=0.05, steps=3, random_start=True)
        if fails:
            with pytest.raises(LossFailedError):
                attack.attack(loss_fn, x, modules=[net])
        else:
            attack.attack(loss_fn, x, modules=[net])
        assert len(calls) == (2 if fails else 3)
        assert [m.training for m in net.modules()] == modes
        assert [p.requires_grad for p in net.parameters()] == flags
        assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
        after = [p.grad for p in net.parameters()]
        assert all(a is g and torch.equal(g, v) for a, (g, v) in zip(after, grads, strict=True))
        now = list(net.buffers())
        assert all(b is was and torch.equal(b, v) for b, (was, v) in zip(now, buffers, strict=True))
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(p.grad is None for p in other.parameters())
        assert torch.equal(x, clean)
        assert x.requires_grad
        assert x.grad is not None
        assert torch.equal(x.grad, torch.full_like(x, 0.25))

    def test_untouched_buffers_keep_their_version(self) -> None:
        net = small_net().train()
        versions = [b._version for b in net.buffers()]
        PGD(eps=0.1, step_size=0.05, steps=2).attack(
            lambda v: net(v).sum(), images(4, 1, 6, 6), modules=[net]
        )
        assert versions
        assert [b._version for b in net.buffers()] == versions

    def test_the_graph_of_an_earlier_forward_stays_valid(self) -> None:
        net = small_net().train()
        x = images(4, 1, 6, 6)
        before = net(x).sum()
        PGD(eps=0.1, step_size=0.05, steps=2).attack(lambda v: net(v).sum(), x, modules=[net])
        before.backward()
        assert net[5].bias.grad is not None
        assert net[5].bias.grad.tolist() == [4.0] * 5

    def test_the_result_has_no_history(self) -> None:
        net = small_net().eval()
        x_adv = PGD(eps=0.1, step_size=0.05, steps=1).attack(
            lambda v: net(v).sum(), images(4, 1, 6, 6)
        )
        assert not x_adv.requires_grad
        assert x_adv.grad_fn is None
        assert all(p.grad is None and p.requires_grad for p in net.parameters())

    def test_frozen_alone(self) -> None:
        net = self.mixed_net()
        modes = [m.training for m in net.modules()]
        inside = []

        def fail_while_frozen() -> None:
            with frozen([net, net[1]]):
                inside.extend(m.training for m in net.modules())
                raise LossFailedError

        with pytest.raises(LossFailedError):
            fail_while_frozen()
        assert inside == [False] * len(modes)
        assert [m.training for m in net.modules()] == modes
        assert [p.requires_grad for p in net.parameters()] == [False, *[True] * 5]

    def test_frozen_does_not_call_train_or_eval(self) -> None:
        class Merging(nn.Linear):  # as adapters do, which merge their weights in eval mode
            def train(self, mode: bool = True) -> Merging:
                raise AssertionError

        net = nn.Sequential(Merging(2, 2))
        with frozen([net]):
            assert not net[0].training
        assert net[0].training

    def test_frozen_drops_a_buffer_registered_meanwhile(self) -> None:
        net = nn.BatchNorm1d(2)
        with frozen([net]):
            net.register_buffer("extra", torch.ones(1))
            del net.running_mean
        assert list(net._buffers) == ["running_mean", "running_var", "num_batches_tracked"]

    def test_frozen_in_inference_mode(self) -> None:
        net = nn.BatchNorm1d(2).train()
        with torch.inference_mode(), frozen([net]):
            net.running_mean += 1
        assert net.running_mean.tolist() == [0.0, 0.0]
        assert not net.running_mean.is_inference()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_the_random_state_of_the_gpu_is_restored(self) -> None:
        x = images(4, 3, 3).cuda()
        state = torch.cuda.get_rng_state(x.device)
        attack = PGD(eps=0.1, step_size=0.05, steps=2, random_start=True)
        x_adv = attack.attack(lambda v: (v * torch.rand_like(v)).sum(), x)
        assert torch.equal(torch.cuda.get_rng_state(x.device), state)
        assert 0 < (x_adv - x).abs().max().item() <= 0.1 + 2**-24


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "sentence"),
        [
            ({"eps": -0.1}, ValueError, "PGD: eps is -0.1, wanted a finite number >= 0"),
            ({"eps": math.nan}, ValueError, "PGD: eps is nan, wanted a finite number >= 0"),
            ({"eps": math.inf}, ValueError, "PGD: eps is inf, wanted a finite number >= 0"),
            ({"eps": "8/255"}, TypeError, "PGD: eps is '8/255', wanted a number"),
            ({"eps": True}, TypeError, "PGD: eps is True, wanted a number"),
            ({"step_size": 0}, ValueError, "PGD: step_size is 0, wanted a finite number > 0"),
            ({"step_size": math.nan}, ValueError, "PGD: step_size is nan, wanted a finite number"),
            ({"step_size": None}, TypeError, "PGD: step_size is None, wanted a number"),
            ({"steps": 0}, ValueError, "PGD: steps is 0, wanted 1 or more"),
            ({"steps": 2.0}, TypeError, "PGD: steps is 2.0, wanted an integer"),
            ({"steps": True}, TypeError, "PGD: steps is True, wanted an integer"),
            ({"norm": "l1"}, ValueError, "PGD: norm is 'l1', wanted 'linf' or 'l2'"),
            ({"norm": 2}, ValueError, "PGD: norm is 2, wanted 'linf' or 'l2'"),
            ({"random_start": 1}, TypeError, "PGD: random_start is 1, wanted True or False"),
            ({"cuda_graph": 1}, TypeError, "PGD: cuda_graph is 1, wanted True or False"),
            ({"restarts": 0}, ValueError, "PGD: restarts is 0, wanted 1 or more"),
            ({"restarts": 2}, ValueError, "PGD: restarts is 2 with random_start=False, wanted 1"),
            ({"keep": "worst"}, ValueError, "PGD: keep is 'worst', wanted 'last' or 'best'"),
            ({"clip": (1.0, 0.0)}, ValueError, "PGD: clip is .1.0, 0.0., wanted .low, high. with"),
            ({"clip": (0.0, math.nan)}, ValueError, "PGD: clip is .0.0, nan., wanted"),
            ({"clip": 1.0}, TypeError, "PGD: clip is 1.0, wanted a tuple of two numbers"),
            ({"clip": (0, 1, 2)}, TypeError, "PGD: clip is .0, 1, 2., wanted a tuple of two"),
            ({"clip": ("0", 1)}, TypeError, "PGD: clip is '0', wanted a number"),
        ],
    )
    def test_settings(
        self, change: dict[str, object], error: type[Exception], sentence: str
    ) -> None:
        good: dict[str, object] = {"eps": 0.1, "step_size": 0.05, "steps": 1}
        with pytest.raises(error, match=sentence):
            PGD(**{**good, **change})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("x", "error", "sentence"),
        [
            (torch.ones(2, 3, dtype=torch.uint8), TypeError, "x has dtype torch.uint8, wanted flo"),
            (torch.empty(0, 1, 4, 4), ValueError, "x has shape .0, 1, 4, 4., wanted .N, ....* one"),
            (torch.tensor(0.5), ValueError, "x has shape .., wanted"),
            (
                torch.tensor([[-0.5], [1.5]]),
                ValueError,
                r"x ranges from -0.5 to 1.5, wanted values within clip=\(0.0, 1.0\)",
            ),
            (torch.tensor([[0.5, math.nan]]), ValueError, "x ranges from nan to nan, wanted"),
        ],
    )
    @pytest.mark.parametrize("eps", [0.0, 0.1])
    def test_images(self, x: Tensor, error: type[Exception], sentence: str, eps: float) -> None:
        with pytest.raises(error, match=f"PGD.attack: {sentence}"):
            PGD(eps=eps, step_size=0.1, steps=1).attack(lambda v: v.sum(), x)

    def test_images_at_a_bound_that_rounds_up_are_within_clip(self) -> None:
        x = torch.full((2, 2), 0.1)  # in float32 above the double 0.1
        x_adv = PGD(eps=0.05, step_size=0.1, steps=1, clip=(0.0, 0.1)).attack(lambda v: v.sum(), x)
        assert torch.equal(x_adv, x)

    @pytest.mark.parametrize(
        ("loss_fn", "error", "sentence"),
        [
            (lambda v: v, ValueError, r"returned shape \(2, 3\), wanted \(\) or \(2,\)"),
            (lambda v: v.sum(0), ValueError, r"returned shape \(3,\), wanted \(\) or \(2,\)"),
            (lambda v: 1.0, TypeError, "loss_fn returned a float, wanted a tensor"),
            (lambda v: v.detach().sum(), ValueError, "does not depend on its argument"),
            (
                lambda v: torch.ones(2, requires_grad=True) * 2,
                ValueError,
                "does not depend on its argument, wanted one that is differentiable in the images",
            ),
        ],
    )
    def test_losses(
        self, loss_fn: Callable[[Tensor], Tensor], error: type[Exception], sentence: str
    ) -> None:
        with pytest.raises(error, match=f"PGD.attack: .*{sentence}"):
            PGD(eps=0.1, step_size=0.1, steps=1).attack(loss_fn, images(2, 3))

    @pytest.mark.parametrize(
        ("modules", "sentence"),
        [
            (nn.Sequential(nn.ReLU()), "frozen: modules is a single Sequential, wanted an iter"),
            ([nn.ReLU(), torch.relu], "frozen: modules holds a builtin_function_or_method, want"),
        ],
    )
    def test_modules(self, modules: list[nn.Module], sentence: str) -> None:
        with pytest.raises(TypeError, match=sentence):
            PGD(eps=0.1, step_size=0.1, steps=1).attack(
                lambda v: v.sum(), images(2, 3), modules=modules
            )
