"""benchmarks/encoder_attacks.py: which run it reads, and what it says of it."""

from __future__ import annotations

from pathlib import Path

import encoder_attacks
import pytest
from safetensors.torch import load_file
from torch import nn
from two_kinds import write_two_kinds

from wcmi_fast import PGD, datasets, functional, models
from wcmi_fast.cli import main
from wcmi_fast.models import GlobalCritic, LocalCritic
from wcmi_fast.training.config import EncoderConfig
from wcmi_fast.training.objective import Critic, new_critic
from wcmi_fast.training.strength import strength
from wcmi_fast.training.trained import load_trained


def filled(module: nn.Module, file: Path) -> nn.Module:
    module.load_state_dict(load_file(file))
    return module.eval()


def test_the_bound_of_a_run_under_attacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_two_kinds(tmp_path / "digits.npz", train=60, test=30), tmp_path / "encoder"
    options = ["--epochs", "2", "--batch-size", "10", "--steps", "1", "--units", "8"]
    main(["train", "encoder", "--data", str(data), *options, "--out", str(run)])
    x = datasets.load(data).x_test[:20].float() / 255
    encoder = models.load(
        "baseline_h", run / "encoder.safetensors", input_shape=(1, 8, 8), classes=64
    )
    z_side = filled(GlobalCritic(64, units=8), run / "global_critic.safetensors")
    h_side = filled(LocalCritic((1, 8, 8), units=8), run / "local_critic.safetensors")
    found = encoder_attacks.values(run, x, 0.1)
    wanted = functional.dv(z_side(encoder(x)), h_side(x)).item()
    assert found["none"] == pytest.approx(wanted, abs=1e-5)
    attacked = [value for name, value in found.items() if name != "none"]
    assert len(attacked) == len(encoder_attacks.ATTACKS)
    assert max(attacked) < wanted
    capsys.readouterr()
    assert encoder_attacks.main([str(run), "--data", str(data), "--images", "20"]) == 0
    assert f"{found['20 steps of 0.01']:.2f}" in capsys.readouterr().out


def test_a_run_that_normalises_images(tmp_path: Path) -> None:
    data, run = write_two_kinds(tmp_path / "digits.npz", train=60, test=30), tmp_path / "encoder"
    options = [
        "--epochs",
        "1",
        "--batch-size",
        "10",
        "--steps",
        "1",
        "--units",
        "8",
        "--mean",
        "0.5",
        "--std",
        "0.25",
    ]
    main(["train", "encoder", "--data", str(data), *options, "--out", str(run)])
    x = datasets.load(data).x_test[:20].float() / 255
    wanted = strength(
        EncoderConfig(attack=PGD(eps=0.1, step_size=0.05, steps=5)),
        PGD(eps=0.1, step_size=0.05, steps=5),
        load_trained(run).model,
        normalised_critic(run),
        x,
    )
    found = encoder_attacks.values(run, x, 0.1)
    assert found["none"] == pytest.approx(wanted["probe_clean"], abs=1e-5)
    assert found["5 steps of 0.05"] == pytest.approx(wanted["probe_attacked"], abs=1e-3)


def normalised_critic(run: Path) -> Critic:
    critic = new_critic(64, 8, (1, 8, 8), (0.5,), (0.25,))
    for name, side in critic.modules().items():
        filled(side, run / f"{name}.safetensors")
    return critic


def test_a_folder_of_no_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_two_kinds(tmp_path / "digits.npz", train=60, test=30)
    assert encoder_attacks.main([str(tmp_path), "--data", str(data)]) == 2
    assert "holds no run of wcmi-fast train" in capsys.readouterr().err
    run = tmp_path / "classifier"
    options = ["--epochs", "1", "--batch-size", "10", "--test-steps", "1"]
    main(["train", "classifier", "--data", str(data), *options, "--out", str(run)])
    capsys.readouterr()
    assert encoder_attacks.main([str(run), "--data", str(data)]) == 2
    assert "of a classifier, wanted that of an encoder" in capsys.readouterr().err
