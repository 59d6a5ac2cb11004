"""Free adversarial training: against its algorithm written out, resumed, and its bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wcmi_fast import PGD
from wcmi_fast.data import Feed, fed
from wcmi_fast.distributed import ranks
from wcmi_fast.models import BaselineH
from wcmi_fast.training import (
    ClassifierConfig,
    EncoderConfig,
    HeadConfig,
    RunFolder,
    train_classifier,
    train_encoder,
    train_head,
)
from wcmi_fast.training.free import Perturbation
from wcmi_fast.training.stage import Values, ignore

ATTACK = PGD(eps=0.2, step_size=0.15, steps=1)
CONFIG = ClassifierConfig(
    attack=ATTACK, free=3, epochs=2, batch_size=8, schedule="constant", eps_warmup=0.0
)
SHAPE = (1, 8, 8)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(20, *SHAPE, generator=generator), torch.arange(20) % 2


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def train(config: ClassifierConfig, folder: Path, stop: int | None = None) -> list[Tensor]:
    batches = iter(range(100 if stop is None else stop))

    def on_batch(values: Values) -> None:
        if next(batches, None) is None:
            raise KeyboardInterrupt

    x, y = data()
    run = RunFolder(folder, every=1)
    model = train_classifier(
        config, new_model(), x, y, seed=0, stage="c", run=run, on_batch=on_batch
    )
    return list(model.state_dict().values())


def test_it_is_the_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shafahi et al.'s algorithm 1, with Adam, in the order of the trainer's batches."""
    seen: list[Tensor] = []
    real = Feed.__getitem__

    def noted(self: Feed, index: Tensor) -> Tensor:
        seen.append(index)
        return real(self, index)

    monkeypatch.setattr(Feed, "__getitem__", noted)
    found = train(CONFIG, tmp_path)
    orders = seen[::2]  # labels and images of one batch have the same indices
    assert len(orders) == 4
    x, y = data()
    model = new_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=CONFIG.learning_rate)
    delta = torch.zeros(8, *SHAPE)
    for indices in orders:
        clean, labels = x[indices], y[indices]
        delta = (clean + delta).clamp(0, 1) - clean
        for _ in range(3):
            point = (clean + delta).requires_grad_()
            optimizer.zero_grad()
            cross_entropy(model(point), labels).backward()
            optimizer.step()
            assert point.grad is not None
            moved = clean + (delta + 0.15 * point.grad.sign()).clamp(-0.2, 0.2)
            delta = moved.clamp(0, 1) - clean
    for ours, theirs in zip(found, model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_has_the_perturbation(stop: int, tmp_path: Path) -> None:
    wanted = train(CONFIG, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, tmp_path / "cut", stop)
    assert all(map(torch.equal, train(CONFIG, tmp_path / "cut"), wanted))


def test_the_radius_grows() -> None:
    perturbation = Perturbation(ATTACK, 2, (4, *SHAPE))
    clean = torch.full((4, *SHAPE), 0.5)
    far: list[float] = []

    def step(images: Tensor) -> Values:
        far.append(float((images.detach() - clean).abs().max()))
        images.sum().backward()
        return {"loss_nats": 0.0}

    perturbation.replay(step, clean, 1.0)
    perturbation.replay(step, clean, 0.5)
    assert far == pytest.approx([0.0, 0.15, 0.1, 0.1], abs=1e-6)


@pytest.mark.parametrize("kind", ["head", "encoder"])
def test_heads_and_encoders_train_so_too(kind: str, tmp_path: Path) -> None:
    x, y = data()
    run = RunFolder(tmp_path)
    if kind == "encoder":
        config = EncoderConfig(attack=ATTACK, free=2, dim=4, units=8, epochs=1, batch_size=8)
        train_encoder(config, x, seed=0, stage="s", run=run)
        (record,) = run.metrics()
        assert record["bound_nats"] == record["worst_case_nats"]
        return
    encoder = BaselineH(SHAPE, dim=4).requires_grad_(False)
    before = [value.clone() for value in encoder.state_dict().values()]
    head = HeadConfig(attack=ATTACK, free=2, epochs=1, batch_size=8)
    train_head(head, encoder, x, y, classes=2, seed=0, stage="s", run=run, on_batch=ignore)
    assert all(map(torch.equal, before, encoder.state_dict().values()))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="ClassifierConfig: free is -1, wanted an integer"):
        replace(CONFIG, free=-1)
    with pytest.raises(ValueError, match="free is 3 and attack is None, wanted one of norm linf"):
        replace(CONFIG, attack=None)
    with pytest.raises(ValueError, match="wanted one of norm linf"):
        replace(CONFIG, attack=replace(ATTACK, norm="l2"))
    with pytest.raises(ValueError, match=r"free is 2, beta 0.5 .* wanted beta 1"):
        EncoderConfig(attack=ATTACK, free=2, beta=0.5)
    with pytest.raises(ValueError, match=r"critic_grad 'encoder_only', wanted beta 1 and 'full'"):
        EncoderConfig(attack=ATTACK, free=2, critic_grad="encoder_only")
    with (
        mock.patch.object(ranks, "count", return_value=2),
        pytest.raises(ValueError, match="f: free is 3 on 2 processes, wanted one process"),
    ):
        Perturbation.of("f", CONFIG, fed(data()[0]))
    with pytest.raises(ValueError, match="step leaves no gradient on its images"):
        Perturbation(ATTACK, 1, (4, *SHAPE)).replay(
            lambda x: {"loss_nats": 0.0}, torch.rand(4, *SHAPE), 1.0
        )
