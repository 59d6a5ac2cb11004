"""Options of training: optimisers, the shared critic, what the attack is worth, mine's average."""

from __future__ import annotations

import copy
import itertools
import math
import re
import subprocess
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from probes import NO_ATTACK
from torch import Tensor, nn

import wcmi_fast
from wcmi_fast import PGD, functional
from wcmi_fast.diagnosis import revision
from wcmi_fast.distributed import ranks
from wcmi_fast.functional.ema import EMAState
from wcmi_fast.models import BaselineH
from wcmi_fast.progress import shown
from wcmi_fast.training import (
    ClassifierConfig,
    EncoderConfig,
    RunFolder,
    board,
    train_classifier,
    train_encoder,
)
from wcmi_fast.training import encoder as encoder_module
from wcmi_fast.training.objective import Mine, new_critic
from wcmi_fast.training.stage import Values, ignore
from wcmi_fast.training.steps import attacked, has_bfloat16, new_optimizer
from wcmi_fast.training.strength import Probe, defeated, strength
from wcmi_fast.training.tasks import told

SHAPE = (1, 8, 8)
ATTACK = PGD(eps=0.2, step_size=0.1, steps=3)
SMALL = EncoderConfig(attack=ATTACK, dim=4, units=8, epochs=2, batch_size=8)


def images(n: int = 24) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(3))


class Stop:
    """Ends a run after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self, values: Values) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def trained(config: EncoderConfig, folder: Path, on_batch: Any = ignore) -> list[Tensor]:
    run = RunFolder(folder, every=1)
    encoder, critic = train_encoder(config, images(), seed=0, stage="e", run=run, on_batch=on_batch)
    modules = (encoder, critic.global_, critic.local)
    return [value for module in modules for value in module.state_dict().values()]


def resumes(config: EncoderConfig, tmp_path: Path) -> bool:
    wanted = trained(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path / "cut", Stop(4))
    return all(map(torch.equal, trained(config, tmp_path / "cut"), wanted))


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.1), (0.0, 0.0)])
def test_sgd_is_nesterovs(momentum: float, decay: float) -> None:
    config = ClassifierConfig(
        attack=None, optimizer="sgd", learning_rate=0.1, momentum=momentum, weight_decay=decay
    )
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = new_optimizer(config, [weight])
    value, velocity = weight.detach().clone(), torch.zeros(2)
    for _ in range(3):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
        grad = 2 * value + decay * value
        velocity = momentum * velocity + grad
        value = value - 0.1 * (grad + momentum * velocity)
    torch.testing.assert_close(weight.detach(), value)


def test_adam_decays_weights_through_the_gradient() -> None:
    found = []
    for decay in (0.0, 0.5):
        config = ClassifierConfig(attack=None, learning_rate=0.1, weight_decay=decay)
        weight = torch.nn.Parameter(torch.tensor([1.0]))
        optimizer = new_optimizer(config, [weight])
        (0.0 * weight).sum().backward()
        optimizer.step()
        found.append(weight.item())
    # Adam's first step has the length of the learning rate wherever the gradient is not 0.
    assert found == pytest.approx([1.0, 0.9])


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_resumes(momentum: float, tmp_path: Path) -> None:
    assert resumes(replace(SMALL, optimizer="sgd", momentum=momentum), tmp_path)


def test_the_moving_average_of_mine_is_in_checkpoints(tmp_path: Path) -> None:
    assert resumes(replace(SMALL, bound="mine"), tmp_path)


def test_mine_with_its_average_kept_in_a_buffer() -> None:
    bound, state = Mine(3), EMAState()
    z, h = torch.randn(5, 4), torch.randn(5, 3, 4)
    for factor in (1, 2, 3):
        wanted = functional.mine(factor * z, h, ema_state=state)
        assert torch.equal(bound(factor * z, h), wanted)
        assert state.log_mean is not None
        assert torch.equal(bound.log_mean, state.log_mean)


def test_a_shared_critic_has_the_encoders_convolutions(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    config = replace(SMALL, shared_critic=True)
    with warnings.catch_warnings():
        # torch warns of weights that an optimiser would step twice.
        warnings.simplefilter("error")
        encoder, critic = train_encoder(config, images(), seed=0, stage="e", run=run)
    shared = critic.local.get_parameter("convolutions.0.weight")
    assert torch.equal(shared, encoder.get_parameter("convolutions.0.weight"))
    start = BaselineH(SHAPE, dim=4).get_parameter("convolutions.0.weight")
    assert not torch.equal(shared, start)
    alone, own = train_encoder(
        replace(config, shared_critic=False),
        images(),
        seed=0,
        stage="e",
        run=RunFolder(tmp_path / "own"),
    )
    assert not torch.equal(
        own.local.get_parameter("convolutions.0.weight"),
        alone.get_parameter("convolutions.0.weight"),
    )


def test_a_shared_critic_resumes(tmp_path: Path) -> None:
    assert resumes(replace(SMALL, shared_critic=True), tmp_path)


def test_strength_is_what_the_attack_takes_away(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder, critic = BaselineH(SHAPE, dim=4).eval(), new_critic(4, 8, SHAPE)
    x = images(8)
    found = strength(SMALL, ATTACK, encoder, critic, x)
    assert found.keys() == {"probe_clean", "probe_attacked", "probe_finer"}
    assert found["probe_attacked"] < found["probe_clean"] - 0.01
    nothing = strength(SMALL, replace(ATTACK, eps=0.0), encoder, critic, x)
    assert set(nothing.values()) == {found["probe_clean"]}
    finer = replace(ATTACK, steps=4 * ATTACK.steps, step_size=ATTACK.step_size / 4)
    assert found["probe_finer"] == strength(SMALL, finer, encoder, critic, x)["probe_attacked"]
    assert found["probe_finer"] != found["probe_attacked"]


@pytest.mark.parametrize(("refresh", "loses"), [(0, True), (2, True), (3, True), (1, None)])
def test_what_a_kept_image_side_loses(refresh: int, loses: bool | None) -> None:
    torch.manual_seed(0)
    encoder, critic = BaselineH(SHAPE, dim=4).eval(), new_critic(4, 8, SHAPE)
    config = replace(SMALL, critic_grad="encoder_only", critic_refresh=refresh)
    found = strength(config, ATTACK, encoder, critic, images(8))
    if loses is None:
        assert "refresh_lost" not in found
        return
    exact = strength(replace(config, critic_refresh=1), ATTACK, encoder, critic, images(8))
    assert found["refresh_lost"] == found["probe_attacked"] - exact["probe_attacked"]
    assert found["refresh_lost"] != 0.0
    assert found["probe_finer"] == exact["probe_finer"]


def test_each_terms_value_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = itertools.count(1)

    def over_ranks(name: str, bound: Any) -> Any:
        value = next(made)  # 1 is the worst case's, 2 the plain one's; attacks come after
        return lambda z, h: value + 0.0 * (z.sum() + h.sum())

    monkeypatch.setattr(encoder_module, "over_ranks", over_ranks)
    monkeypatch.setattr(encoder_module, "strength", lambda *given: NO_ATTACK)
    trained(replace(SMALL, beta=0.25, epochs=1), tmp_path)
    (record,) = RunFolder(tmp_path).metrics()
    assert (record["worst_case_nats"], record["information_nats"]) == (1.0, 2.0)
    assert record["bound_nats"] == 1.75


def test_an_encoders_metrics(tmp_path: Path) -> None:
    config = replace(SMALL, beta=0.25, critic_grad="encoder_only", critic_refresh=2)
    trained(config, tmp_path)
    for record in RunFolder(tmp_path).metrics():
        wanted = 0.75 * record["information_nats"] + 0.25 * record["worst_case_nats"]
        assert record["bound_nats"] == pytest.approx(wanted)
        probes = {"probe_clean", "probe_attacked", "probe_finer", "refresh_lost"}
        assert probes <= record.keys()
    trained(replace(SMALL, beta=0.0), tmp_path / "plain")
    assert "probe_clean" not in RunFolder(tmp_path / "plain").metrics()[-1]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((3.0, 2.0, 0.99), True),  # in nats: clean, attacked, under a finer attack
        ((3.0, 2.0, 1.01), False),
        ((3.0, 3.1, 2.89), True),  # an attack that raises the bound takes nothing
        ((3.0, 3.1, 2.91), False),
        ((0.1, 0.09, 0.05), False),
    ],
)
def test_what_is_a_defeated_attack(values: tuple[float, ...], wanted: bool) -> None:
    assert defeated(dict(zip(NO_ATTACK, values, strict=True))) == wanted


@pytest.mark.parametrize("stop", [False, True])
def test_a_defeated_attack_warns_and_stops_if_asked(
    stop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, epochs=3, stop_on_overfitting=stop)
    lost = {"probe_clean": 3.5, "probe_attacked": 3.25, "probe_finer": 0.25}
    found = iter([NO_ATTACK, lost, NO_ATTACK])
    monkeypatch.setattr(encoder_module, "strength", lambda *given: next(found))
    sentence = "train_encoder: stage 'e': .* from 3.50 to 3.25 in epoch 2, .* shorter, to 0.25"
    with pytest.warns(UserWarning, match=sentence):
        trained(config, tmp_path)
    done = [record["epoch"] for record in RunFolder(tmp_path).metrics()]
    assert done == ([1, 2] if stop else [1, 2, 3])
    trained(config, tmp_path)  # does not go on
    assert len(RunFolder(tmp_path).metrics()) == len(done)


def test_an_attacks_starts_are_those_of_the_generator() -> None:
    start = replace(ATTACK, random_start=True)

    def found(seed: int, part: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return attacked(start, lambda x: x.flatten(1).sum(1), images(), part, generator)

    assert torch.equal(found(0), found(0))
    assert not torch.equal(found(0), found(1))
    # At half the radius an image moves by at most that, and by more than a quarter.
    assert 0.05 < (found(0, 0.5) - images()).abs().max() <= 0.1 + 1e-6


def test_one_of_several_processes_warns_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {"probe_clean": 3.5, "probe_attacked": 3.25, "probe_finer": 0.25}
    probe = Probe(lambda epoch: lost, stop=True, where="here")
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe.after_epoch(1)
    assert probe.ended
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    with pytest.warns(UserWarning, match="here: the attack of training lowers"):
        probe.after_epoch(2)


def test_an_attack_that_training_does_not_defeat(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(SMALL, tmp_path)


def test_free_training_of_an_encoder_resumes(tmp_path: Path) -> None:
    assert resumes(replace(SMALL, free=2), tmp_path)


def test_a_classifier_is_attacked_in_eval_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = BaselineH(SHAPE, dim=3), []
    # One label: the order of the batch does not matter.
    x, y = images(), torch.zeros(24, dtype=torch.int64)

    def attack(self: PGD, loss_fn: Any, x: Tensor, **given: Any) -> Tensor:
        fixed = copy.deepcopy(model).eval()
        wanted = torch.nn.functional.cross_entropy(fixed(x), y, reduction="none")
        seen.append(torch.allclose(loss_fn(x), wanted, atol=1e-4))
        return x

    monkeypatch.setattr(PGD, "attack", attack)
    config = ClassifierConfig(attack=ATTACK, epochs=3, batch_size=24, eps_warmup=0.0)
    train_classifier(config, model, x, y, seed=0, stage="c", run=RunFolder(tmp_path))
    assert seen == [True] * 3


def test_a_classifiers_metrics(tmp_path: Path) -> None:
    x, y = images(), torch.arange(24) % 3
    torch.manual_seed(0)
    config = ClassifierConfig(attack=None, epochs=1, batch_size=24, learning_rate=0.0)
    model = BaselineH(SHAPE, dim=3)
    run = RunFolder(tmp_path)
    train_classifier(config, model, x, y, seed=0, stage="c", run=run)
    (record,) = run.metrics()
    with torch.no_grad():
        logits = model.train()(x)
    assert record["loss_nats"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-5
    )
    assert record["training_accuracy"] == pytest.approx(
        float((logits.argmax(1) == y).float().mean())
    )


@pytest.mark.skipif(not has_bfloat16("cpu"), reason="this CPU has no products in bfloat16")
def test_amp_computes_in_bfloat16_and_keeps_the_weights(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    def note(module: nn.Module, given: Any, result: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            seen.add(result.dtype)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        amp = trained(replace(SMALL, amp=True), tmp_path / "amp")
    finally:
        handle.remove()
    plain = trained(SMALL, tmp_path / "plain")
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in amp} <= {torch.float32, torch.int64}
    assert not all(map(torch.equal, amp, plain))
    values = [RunFolder(tmp_path / name).metrics()[-1]["bound_nats"] for name in ("amp", "plain")]
    assert values[0] == pytest.approx(values[1], abs=0.1)


def test_amp_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    with pytest.raises(ValueError, match="EncoderConfig: amp is True, and cpu has no products in"):
        trained(replace(SMALL, amp=True), tmp_path)


def test_compiled_steps_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = torch.compile, []

    def compiled(module: nn.Module) -> Any:
        asked.append(type(module).__name__)
        # Code generation takes minutes; this traces, and runs what was traced.
        return real(module, backend="eager")

    monkeypatch.setattr(torch, "compile", compiled)
    plain = trained(replace(SMALL, epochs=1), tmp_path / "plain")
    assert not asked
    found = trained(replace(SMALL, epochs=1, compile=True), tmp_path / "compiled")
    assert sorted(asked) == ["BaselineH", "GlobalCritic", "LocalCritic"]
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_tensorboard_has_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path / "run", on_record=board.writer(tmp_path / "board"))
    train_encoder(SMALL, images(), seed=0, stage="e", run=run)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    records = run.metrics()
    names = records[0].keys() - {"stage", "epoch"}
    assert events.Tags()["scalars"] == sorted(f"e/{name}" for name in names)
    found = [(event.step, event.value) for event in events.Scalars("e/bound_nats")]
    assert [step for step, _ in found] == [1, 2]
    wanted = [record["bound_nats"] for record in records]
    assert [value for _, value in found] == pytest.approx(wanted)


def test_a_progress_bar_shows_speed_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(True, 4, rate=(10, "images/s")) as progress:
        on_batch = told(progress)
        for _ in range(4):
            time.sleep(0.01)
            on_batch({"loss_nats": 1.25, "training_accuracy": 0.5})
    printed = capsys.readouterr().err
    assert "loss_nats 1.250" in printed
    assert re.search(r"[1-9]\d* images/s", printed)


def test_the_revision_is_gits() -> None:
    package = Path(wcmi_fast.__file__).parent
    if not (package.parent / ".git").exists():
        pytest.skip("the package does not lie in a checkout")
    git = ["git", "-C", str(package.parent), "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    assert revision().rstrip("+") == found


def test_the_revision_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wcmi_fast, "__file__", str(tmp_path / "wcmi_fast" / "__init__.py"))
    assert revision() == "unknown"
    (tmp_path / "wcmi_fast").mkdir()
    (tmp_path / "wcmi_fast" / "revision.txt").write_text("abc+\n")
    assert revision() == "abc+"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="EncoderConfig: optimizer is 'lion', wanted 'adam' or"):
        replace(SMALL, optimizer="lion")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"momentum is 1.0, wanted 0 or more, below 1"):
        replace(SMALL, momentum=1.0)
    for decay in (-0.1, math.inf):
        with pytest.raises(ValueError, match=f"weight_decay is {decay}, wanted"):
            replace(SMALL, weight_decay=decay)
    with pytest.raises(ValueError, match=r"beta is 0.5 with shared_critic, wanted 0 or 1"):
        replace(SMALL, beta=0.5, shared_critic=True)
