"""The bound of a trained encoder's test images under attacks of several step sizes.

    python benchmarks/encoder_attacks.py runs/encoder

An encoder that has learned to defeat the attack of its training keeps its bound under that one, and
loses it under a finer one (docs/training.md, "Attacks that are defeated").
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from wcmi_fast import datasets
from wcmi_fast.attacks import PGD
from wcmi_fast.data import Feed
from wcmi_fast.training.objective import BOUNDS, Critic, information_loss, new_critic
from wcmi_fast.training.run_folder import SETTINGS
from wcmi_fast.training.trained import Trained, load_trained

# Steps, and the length of each as a part of eps.
ATTACKS = ((5, 0.5), (7, 0.25), (10, 0.2), (20, 0.1), (100, 0.05))


def main(args: Sequence[str] | None = None) -> int:
    """Attack a batch in every way, and print what is left; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished `wcmi-fast train encoder`")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=64, help="test images, one batch")
    given = parser.parse_args(args)
    try:
        images = Feed(datasets.load(given.data).x_test, "cpu")[: given.images]
        found = values(given.run, images, given.eps)
    except (OSError, ValueError) as error:
        print(f"encoder_attacks: {error}", file=sys.stderr)
        return 2
    table = Table(title=f"{given.run}: dv of {len(images)} test images, eps {given.eps:g}")
    table.add_column("attack")
    table.add_column("nats", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    return 0


def values(run: Path, images: torch.Tensor, eps: float) -> dict[str, float]:
    """Return dv in nats of the images, unattacked and under each attack, by its name."""
    trained = load_trained(run, input_shape=images.shape[1:])
    encoder, critic = trained.model.requires_grad_(False), _critic(run, trained)
    loss_fn = information_loss(encoder, critic, BOUNDS["dv"], "full")
    found = {"none": -float(loss_fn(images))}
    for steps, part in ATTACKS:
        attack = PGD(eps=eps, step_size=part * eps, steps=steps)
        attacked = attack.attack(loss_fn, images)
        found[f"{steps} steps of {part * eps:g}"] = -float(loss_fn(attacked))
    return found


def _critic(run: Path, trained: Trained) -> Critic:
    if trained.task != "encoder":
        raise ValueError(f"run is {run}, of a {trained.task}, wanted that of an encoder")
    settings = json.loads((run / SETTINGS).read_text())
    channels, height, width = trained.input_shape
    critic = new_critic(
        trained.outputs,
        settings["units"],
        (channels, height, width),
        settings["mean"],
        settings["std"],
    )
    for name, side in critic.modules().items():
        side.load_state_dict(load_file(run / f"{name}.safetensors"))
        side.eval().requires_grad_(False)
    return critic


if __name__ == "__main__":
    raise SystemExit(main())
