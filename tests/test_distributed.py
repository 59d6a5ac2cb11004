"""Several gloo processes do what one does: bounds, gradients, training, ends and resumption."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_twice_as_good
from processes import on_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wcmi_fast import PGD
from wcmi_fast.distributed import ranks
from wcmi_fast.distributed.bounds import global_critic_stats, over_ranks
from wcmi_fast.distributed.parallel import share_statistics_, synchronised_
from wcmi_fast.functional import linf_start_
from wcmi_fast.functional.ema import EMAState
from wcmi_fast.models.folding import folded
from wcmi_fast.training import encoder as encoder_module
from wcmi_fast.training import signals
from wcmi_fast.training.config import ClassifierConfig, EncoderConfig, HeadConfig
from wcmi_fast.training.encoder import train_encoder
from wcmi_fast.training.objective import BOUNDS
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.stage import OnBatch, Values, ignore
from wcmi_fast.training.supervised import train_classifier, train_head
from wcmi_fast.training.watch import Watch

N, P, U = 12, 3, 5
# At scores of +-150 exp overflows in the others.
SAFE_AT_ANY_SIZE = ("dv", "dv_authors", "infonce", "smile", "mine", "jsd", "fenchel_GAN")
CASES = [(name, 1.0) for name in BOUNDS] + [(name, 40.0) for name in SAFE_AT_ANY_SIZE]


# The bounds


def features(size: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(N, U, generator=generator)
    h = size * torch.randn(N, P, U, generator=generator)
    # Ranks whose scores are far from each other's tell a merge of maxima from a sum.
    return z, h * torch.linspace(0.5, 1.5, N)[:, None, None]


def bound_and_gradients(
    name: str, size: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    z, h = (own.to(dtype).requires_grad_() for own in map(ranks.own, features(size)))
    state = {"ema_state": EMAState()} if name == "mine" else {}
    bound = partial(BOUNDS[name], **state)
    value = over_ranks(name, bound)(z, h)
    dz, dh = torch.autograd.grad(3 * value, (z, h))
    return value.detach(), dz, dh


def all_bounds(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [bound_and_gradients(name, size, dtype) for name, size in CASES]


@pytest.mark.parametrize("count", [2, 4])
def test_bounds_and_gradients_are_those_of_one_process(count: int) -> None:
    found = on_ranks(count, all_bounds, torch.float32)
    same, exact = all_bounds(torch.float32), all_bounds(torch.float64)
    for k in range(len(CASES)):
        values = [rank[k][0] for rank in found]
        assert all(torch.equal(value, values[0]) for value in values)
        ours = (values[0], *(torch.cat([rank[k][i] for rank in found]) for i in (1, 2)))
        for mine, one, true in zip(ours, same[k], exact[k], strict=True):
            assert true.isfinite().all()
            assert true.any()
            assert_twice_as_good(mine, one, true)


def a_row_of_minus_infinity() -> tuple[Tensor, ...]:
    """Return positives, lse and gradient where no score of the first row is finite."""
    z, h = torch.full((4, 1), 0.1), torch.full((4, 1, 1), 10.0)
    z[0] = -3e38
    h = ranks.own(h).requires_grad_()
    stats = global_critic_stats(ranks.own(z), h, which="dv")
    assert stats.lse is not None
    (dh,) = torch.autograd.grad(stats.lse.exp().sum(), h)
    return stats.positives.detach(), stats.lse.detach(), dh


def test_a_row_of_minus_infinity() -> None:
    wanted = a_row_of_minus_infinity()
    assert wanted[1][0] == -torch.inf
    assert wanted[2].isfinite().all()
    found = on_ranks(2, a_row_of_minus_infinity)
    for k in (0, 1):
        torch.testing.assert_close(found[0][k], wanted[k])
    torch.testing.assert_close(torch.cat([rank[2] for rank in found]), wanted[2])


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


def largest_tensor(n: int, p: int) -> int:
    z = ranks.own(torch.randn(n, 4)).requires_grad_()
    h = ranks.own(torch.randn(n, p, 4)).requires_grad_()
    with Largest() as largest:
        over_ranks("dv", BOUNDS["dv"])(z, h).backward()
    return largest.numbers


def test_no_process_has_all_of_t() -> None:
    n, p = 64, 8
    assert largest_tensor(n, p) >= n * n * p  # small: one process keeps it
    assert max(on_ranks(4, largest_tensor, n, p)) <= n * (n // 4) * p


def in_dtype(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return bound_and_gradients("dv", 1.0, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    value, dz, dh = bound_and_gradients("dv", 1.0, torch.float64)
    found = on_ranks(2, in_dtype, dtype)
    assert found[0][1].dtype == found[0][2].dtype == dtype
    ours = (found[0][0], *(torch.cat([rank[i] for rank in found]) for i in (1, 2)))
    for mine, true in zip(ours, (value, dz, dh), strict=True):
        assert (mine.double() - true).abs().max() <= 0.03 * true.abs().max()


def twice_differentiated() -> None:
    z, h = (own.requires_grad_() for own in map(ranks.own, features(1.0)))
    value = over_ranks("dv", BOUNDS["dv"])(z, h)
    (dh,) = torch.autograd.grad(value, h, create_graph=True)
    dh.sum().backward()


def test_second_derivatives_are_refused() -> None:
    assert all("once_differentiable" in said for said in on_ranks(2, twice_differentiated))


# Training


# Where the other processes are told to write: they neither write there, nor need what is there.
ELSEWHERE = "elsewhere"


class Run:
    """A training of a few steps, and what it leaves."""

    rows, batch = 40, 8

    def __init__(self, **changes: Any) -> None:
        self.attack = PGD(
            eps=0.2, step_size=0.1, steps=2, random_start=True, restarts=2, keep="best"
        )
        self.changes = changes

    def encoder(self, folder: Path, on_batch: OnBatch = ignore) -> dict[str, Any]:
        encoder_module.new_encoder = lambda config, shape: network(config.dim)
        config = EncoderConfig(
            attack=self.attack,
            beta=0.5,
            dim=4,
            units=8,
            epochs=4,
            batch_size=self.batch,
            sync_batch_norm=True,
            # Neither a clipped gradient nor Adam's step shows a factor before the gradient.
            optimizer="sgd",
            learning_rate=0.02,
            grad_clip=1e9,
        )
        run = RunFolder(folder if ranks.is_first() else folder / ELSEWHERE, every=3)
        encoder, critic = train_encoder(
            replace(config, **self.changes), images(), seed=0, stage="s", run=run, on_batch=on_batch
        )
        return {"metrics": run.metrics(), **weights(encoder, critic.global_, critic.local)}

    def classifier(self, folder: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        model = network(2)
        watch = Watch(rows=8, attack=replace(self.attack, restarts=1), keep_best=True)
        config = ClassifierConfig(
            attack=self.attack, watch=watch, epochs=5, batch_size=self.batch, sync_batch_norm=True
        )
        run = RunFolder(folder)
        config = replace(config, **self.changes)
        model = train_classifier(config, model, images(), labels(), seed=0, stage="s", run=run)
        return {"metrics": run.metrics(), **weights(model)}

    def head(self, folder: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU())
        config = HeadConfig(
            attack=self.attack, kind="linear", epochs=4, batch_size=self.batch, optimizer="sgd"
        )
        run = RunFolder(folder)
        head = train_head(
            replace(config, **self.changes), encoder, images(), labels(), classes=2, seed=0,
            stage="s", run=run,
        )  # fmt: skip
        return {"metrics": run.metrics(), **weights(head)}


def network(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, outputs),
    )  # fmt: skip


def images() -> Tensor:
    return torch.rand(Run.rows, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def labels() -> Tensor:
    return torch.arange(Run.rows) % 2


def weights(*modules: nn.Module) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": value
        for i, module in enumerate(modules)
        for name, value in module.state_dict().items()
    }


def in_float64(run: Run, kind: str, folder: Path) -> dict[str, Any]:
    """Train where rounding cannot turn the sign of an attack's step."""
    torch.set_default_dtype(torch.float64)
    found: dict[str, Any] = getattr(run, kind)(folder)
    return found


def assert_same_run(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-7) -> None:
    assert len(found["metrics"]) == len(wanted["metrics"]) > 0
    for ours, theirs in zip(found["metrics"], wanted["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"stage"}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance)
    for name in wanted.keys() - {"metrics"}:
        torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)


def equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    names = left.keys() - {"metrics"}
    return left["metrics"] == right["metrics"] and all(
        torch.equal(left[name], right[name]) for name in names
    )


@pytest.fixture(scope="module")
def runs_of_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    kinds = ("encoder", "classifier", "head")
    return {
        kind: on_ranks(1, in_float64, Run(), kind, tmp_path_factory.mktemp(kind))[0]
        for kind in kinds
    }


@pytest.mark.parametrize("kind", ["encoder", "classifier", "head"])
def test_twenty_steps_on_two_ranks_are_those_of_one(
    kind: str, runs_of_one: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    found = on_ranks(2, in_float64, Run(), kind, tmp_path)
    assert equal(*found)
    assert_same_run(found[0], runs_of_one[kind])


def stopped(folder: Path) -> str:
    """Train, with a signal to the last process in the eighth of twenty steps."""
    torch.set_default_dtype(torch.float64)
    left = iter(range(7))

    def on_batch(values: Values) -> None:
        if next(left, None) is None and ranks.rank() == ranks.count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with signals.finishing_steps():
        Run().encoder(folder, on_batch)
    return "not stopped"


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_ends_all_and_others_go_on(
    first: int, then: int, runs_of_one: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    said = on_ranks(first, stopped, tmp_path)
    sentence = "StoppedError: stopped by SIGTERM in stage 's' after epoch 1, batch 3"
    assert said == [sentence] * first
    found = on_ranks(then, in_float64, Run(), "encoder", tmp_path)
    assert_same_run(found[0], runs_of_one["encoder"])


def killed(folder: Path) -> str:
    """Train, without the last process from the ninth step on."""
    left = iter(range(8))

    def on_batch(values: Values) -> None:
        if next(left, None) is None and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with ranks.explained():
        Run().encoder(folder, on_batch)
    return "not killed"


def test_a_killed_rank_ends_the_other_with_a_checkpoint(tmp_path: Path) -> None:
    said, nothing = on_ranks(2, killed, tmp_path)
    assert nothing is None
    assert said.startswith("RuntimeError: rank 0 of 2 failed, or lost another that did")
    assert "the same command with --out goes on there" in said
    names = sorted(folder.name for folder in (tmp_path / "checkpoints" / "s").iterdir())
    assert names == ["epoch-0001", "epoch-0001-batch-0000003"]
    assert len(on_ranks(2, resumed_metrics, tmp_path)[0]) == 4


def resumed_metrics(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = Run().encoder(folder)["metrics"]
    return found


def without_synchronisation(folder: Path) -> dict[str, Any]:
    return Run(sync_batch_norm=False, optimizer="adam", learning_rate=1e-3).encoder(folder)


def test_ranks_agree_without_synchronised_batch_norm(tmp_path: Path) -> None:
    left, right = on_ranks(2, without_synchronisation, tmp_path)
    assert equal(left, right)
    assert [record["epoch"] for record in left["metrics"]] == [1, 2, 3, 4]
    assert not (tmp_path / ELSEWHERE).exists()


def bad_batch(folder: Path, batch: int) -> dict[str, Any]:
    return Run(batch_size=batch).encoder(folder)


@pytest.mark.parametrize("batch", [9, 2])
def test_a_batch_that_ranks_cannot_share(batch: int, tmp_path: Path) -> None:
    sentence = (
        f"ValueError: train_encoder: batch_size is {batch} on 2 processes, wanted a multiple of 2 "
        "with 2 images or more for each"
    )
    assert on_ranks(2, bad_batch, tmp_path, batch) == [sentence] * 2


def claimed(folder: Path, value: int) -> None:
    RunFolder(folder).claim("f", {"value": value})


def test_a_folder_of_another_run(tmp_path: Path) -> None:
    on_ranks(2, claimed, tmp_path, 1)
    first, other = on_ranks(2, claimed, tmp_path, 2)
    assert first.startswith("ValueError: f: folder")
    assert other.startswith("RuntimeError: rank 0 failed: f: folder")
    assert "wanted the same settings" in other


# Parts


def normalised(synchronised: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x = 5 + torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    norm = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in norm.parameters():
            tensor.uniform_(0.5, 1.5)
    if synchronised:
        synchronised_(norm)
    own = ranks.own(x).requires_grad_()
    found = norm(own)
    (found * ranks.own(weight)).sum().backward()
    share_statistics_([norm])
    assert own.grad is not None
    assert len(folded(norm)) == 1
    in_attack = folded(norm)(ranks.own(x))
    return found.detach(), own.grad, in_attack, norm[1].running_mean, norm[1].running_var


def test_synchronised_batch_norm_is_that_of_the_whole_batch() -> None:
    (wanted,) = on_ranks(1, normalised, True)
    found = on_ranks(4, normalised, True)
    for k, exact in enumerate(wanted):
        together = torch.cat([rank[k] for rank in found]) if k < 3 else found[0][k]
        torch.testing.assert_close(together, exact)
    (first, *_), *_ = on_ranks(2, normalised, False)
    assert not torch.allclose(first, wanted[0][:4])


def test_shared_statistics_are_the_mean_over_ranks() -> None:
    norms = on_ranks(2, normalised, False)
    assert torch.equal(norms[0][3], norms[1][3])
    assert torch.equal(norms[0][4], norms[1][4])
    (wanted,) = on_ranks(1, normalised, False)
    torch.testing.assert_close(norms[0][3], wanted[3])  # means of halves have the whole's mean


def numbers() -> list[Tensor]:
    torch.manual_seed(0)
    with ranks.own_random_numbers():
        own = torch.rand(3)
    return [own, torch.rand(3)]


def test_random_numbers_differ_within_and_agree_after() -> None:
    (own, after), (other, after_too) = on_ranks(2, numbers)
    assert not torch.equal(own, other)
    assert torch.equal(after, after_too)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_parts_of_a_batch_start_where_the_whole_does(norm: Any) -> None:
    attack = PGD(eps=0.3, step_size=0.05, steps=2, norm=norm, random_start=True, restarts=2)
    x = torch.rand(6, 3, 5, 5)

    def attacked(rows: slice, part_of: tuple[int, int] | None) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return attack.attack(
            lambda x: x.flatten(1).square().sum(1), x[rows], generator=generator, part_of=part_of
        )

    parts = [attacked(slice(i, i + 2), (i, 6)) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), attacked(slice(0, 6), None))


@pytest.mark.parametrize("part_of", [(5, 6), (-1, 6), (0, 1)])
def test_a_part_without_room(part_of: tuple[int, int]) -> None:
    attack = PGD(eps=0.3, step_size=0.05, steps=1)
    with pytest.raises(ValueError, match=r"PGD.attack: part_of is .* with room for x's 2"):
        attack.attack(lambda x: x.sum(), torch.rand(2, 3), part_of=part_of)


@pytest.mark.parametrize("cut", [1, 7, 8])
def test_random_starts_of_parts(cut: int) -> None:
    origin = torch.rand(21)
    whole = linf_start_(torch.empty(21), origin, eps=0.1, seed=3)
    rest = linf_start_(torch.empty(21 - cut), origin[cut:], eps=0.1, seed=3, first=cut)
    assert torch.equal(rest, whole[cut:])
    with pytest.raises(ValueError, match="linf_start_: first is -1, wanted 0 or more"):
        linf_start_(torch.empty(21), origin, eps=0.1, seed=3, first=-1)
