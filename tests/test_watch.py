"""Held-out images under attack: the best epoch, overfitting, resumption."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from wcmi_fast import PGD
from wcmi_fast.distributed import ranks
from wcmi_fast.models import BaselineH, LinearHead, MLPHead
from wcmi_fast.training import supervised
from wcmi_fast.training.config import ClassifierConfig, HeadConfig
from wcmi_fast.training.evaluation import accuracy
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.stage import Values
from wcmi_fast.training.supervised import train_classifier, train_head
from wcmi_fast.training.watch import Watch, Watched

ATTACK = PGD(eps=0.1, step_size=0.05, steps=2)
WATCH = Watch(rows=8, attack=ATTACK)
CONFIG = ClassifierConfig(attack=None, epochs=4, batch_size=8)


def data() -> tuple[Tensor, Tensor]:
    labels = torch.arange(40) % 2
    noise = 0.2 * torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return noise + 0.7 * labels.view(-1, 1, 1, 1), labels


def train(config: ClassifierConfig, folder: Path, model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    x, y = data()
    return train_classifier(
        config,
        model or BaselineH((1, 8, 8), dim=2),
        x,
        y,
        seed=0,
        stage="c",
        run=RunFolder(folder),
    )


def measured(values: list[float]) -> Iterator[mock.Mock]:
    """Let the accuracies of the held-out images be these."""
    return mock.patch.object(supervised, "accuracy", side_effect=values)  # type: ignore[return-value]


def states_after_epochs(tmp_path: Path, epochs: int) -> list[dict[str, Tensor]]:
    found = []
    for count in range(1, epochs + 1):
        # The schedule is that of all epochs: the run is ended after some of them.
        x, y = data()
        torch.manual_seed(0)
        model = BaselineH((1, 8, 8), dim=2)
        done = iter(range(count * 4))

        def stop(values: Values, done: Iterator[int] = done) -> None:
            if next(done, None) is None:
                raise KeyboardInterrupt

        try:
            train_classifier(
                replace(CONFIG, watch=WATCH),
                model,
                x,
                y,
                seed=0,
                stage="c",
                run=RunFolder(tmp_path / f"{count}"),
                on_batch=stop,
            )
        except KeyboardInterrupt:
            folder = RunFolder(tmp_path / f"{count}")
            model = BaselineH((1, 8, 8), dim=2)
            optimizer = torch.optim.Adam(model.parameters())
            kept = Watched(WATCH, model, lambda: 0.0, "f", "c")
            folder.restore("c", {"model": model, "watched": kept}, optimizer)  # type: ignore[dict-item]
        found.append({k: v.clone() for k, v in model.state_dict().items()})
    return found


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_best_epochs_weights_are_returned(tmp_path: Path) -> None:
    states = states_after_epochs(tmp_path / "states", 4)
    with measured([0.5, 0.8, 0.7, 0.6]):
        best = train(replace(CONFIG, watch=replace(WATCH, keep_best=True)), tmp_path / "best")
    with measured([0.5, 0.8, 0.7, 0.6]):
        last = train(replace(CONFIG, watch=WATCH), tmp_path / "last")
    assert same(best, states[1])
    assert same(last, states[3])
    assert not same(best, states[3])
    logged = [r["held_out_adversarial_accuracy"] for r in RunFolder(tmp_path / "best").metrics()]
    assert logged == [0.5, 0.8, 0.7, 0.6]


def test_held_out_images_are_not_trained_on(tmp_path: Path) -> None:
    x, _ = data()
    seen: list[Tensor] = []

    class Recorded(BaselineH):
        def forward(self, given: Tensor) -> Tensor:
            if self.training:
                seen.append(given.detach().clone())
            return super().forward(given)

    train(replace(CONFIG, watch=WATCH), tmp_path, Recorded((1, 8, 8), dim=2))
    used = torch.cat(seen)
    assert len(used) == 4 * 32
    for held in x[32:]:
        assert not (used == held).flatten(1).all(1).any()


def test_the_accuracy_is_that_of_the_held_out_images_under_the_attack(tmp_path: Path) -> None:
    with mock.patch.object(supervised, "accuracy", wraps=accuracy) as watched:
        train(replace(CONFIG, epochs=1, watch=WATCH), tmp_path)
    (call,) = watched.call_args_list
    x, y = data()
    assert torch.equal(call.args[2], x[32:])
    assert torch.equal(call.args[3], y[32:])
    assert call.kwargs["attack"] == ATTACK


@pytest.mark.parametrize("stop", [False, True])
def test_catastrophic_overfitting_warns_and_stops_if_asked(stop: bool, tmp_path: Path) -> None:
    config = replace(CONFIG, watch=replace(WATCH, stop=stop, keep_best=True))
    sentence = (
        "stage 'c': accuracy under attack on held-out images fell from 80.0 to 10.0 % in epoch 3"
    )
    with measured([0.6, 0.8, 0.1, 0.7]), pytest.warns(UserWarning, match=sentence):
        train(config, tmp_path)
    assert [r["epoch"] for r in RunFolder(tmp_path).metrics()] == (
        [1, 2, 3] if stop else [1, 2, 3, 4]
    )
    if stop:  # and does not go on when it is called again
        with measured([]), warnings.catch_warnings():
            warnings.simplefilter("error")
            train(config, tmp_path)


def test_one_of_several_processes_warns() -> None:
    falling = iter([0.8, 0.1] * 2)
    watch = replace(WATCH, stop=True)
    for rank, warned in ((0, 1), (1, 0)):
        watched = Watched(watch, nn.Identity(), lambda: next(falling), "train_head", "h")
        with mock.patch.object(ranks, "rank", lambda rank=rank: rank):
            watched.after_epoch(1)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                watched.after_epoch(2)
        assert len(seen) == warned
        assert watched.ended  # all of them stop


def test_a_slow_fall_is_no_overfitting(tmp_path: Path) -> None:
    with measured([0.8, 0.6, 0.5, 0.41]), warnings.catch_warnings():
        warnings.simplefilter("error")
        train(replace(CONFIG, watch=WATCH), tmp_path)


def test_a_killed_run_keeps_the_best(tmp_path: Path) -> None:
    config = replace(CONFIG, watch=replace(WATCH, keep_best=True))
    with measured([0.5, 0.8, 0.7, 0.6]):
        wanted = train(config, tmp_path / "whole")
    values = iter([0.5, 0.8])

    def killed(*given: object, **options: object) -> float:
        value = next(values, None)
        if value is None:
            raise KeyboardInterrupt
        return value

    with mock.patch.object(supervised, "accuracy", killed), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed")
    with measured([0.7, 0.6]):
        found = train(config, tmp_path / "killed")
    assert same(found, wanted.state_dict())


@pytest.mark.parametrize(("kind", "built"), [("mlp", MLPHead), ("linear", LinearHead)])
def test_heads_of_both_kinds(kind: str, built: type[nn.Module], tmp_path: Path) -> None:
    x, y = data()
    config = HeadConfig(
        attack=None,
        kind=kind,
        watch=WATCH,
        epochs=20,
        batch_size=8,
        learning_rate=0.05,  # type: ignore[arg-type]
    )
    run = RunFolder(tmp_path)
    head = train_head(config, nn.Flatten(), x, y, classes=2, seed=0, stage="h", run=run)
    assert isinstance(head, built)
    assert accuracy(nn.Flatten(), head, x, y, attack=None) > 0.95
    assert run.metrics()[-1]["held_out_adversarial_accuracy"] > 0.9


@pytest.mark.parametrize("rows", [0, -1, 2.5, True])
def test_rows_that_are_no_number_of_images(rows: object) -> None:
    with pytest.raises(ValueError, match=f"Watch: rows is {rows}, wanted an integer, 1 or more"):
        replace(WATCH, rows=rows)


def test_more_rows_than_can_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_classifier: watch.rows is 35 of 40 training"):
        train(replace(CONFIG, watch=replace(WATCH, rows=35)), tmp_path)
