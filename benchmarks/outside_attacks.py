"""torchattacks' PGD and AutoAttack beside our PGD, on a classifier of `wcmi-fast export`.

torchattacks is no dependency of wcmi_fast. The release of requests that it asks for is of 2021, and
not imported:

    pip install --no-deps torchattacks
    python benchmarks/outside_attacks.py classifier.pt2 --data fashion_mnist --autoattack

The exit status is 1 if an accuracy under their PGD and under ours differ by more than 1 point at
equal settings, and 2 if a file, the data or torchattacks is not there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch
from peer_case import PeerFailedError, import_peer, peer_runs
from rich.console import Console
from rich.table import Table
from timing import environment
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wcmi_fast import datasets
from wcmi_fast.attacks import PGD
from wcmi_fast.data import Feed
from wcmi_fast.files import write_file
from wcmi_fast.models import load_exported

PEER = "torchattacks"
BATCH = 125
# Points of accuracy between theirs and ours.
ALLOWED = 1.0
# Of a table that goes to a file or a pipe.
FILE_WIDTH = 120

# A batch of images and its labels -> the attacked images.
Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """An attack, and what it left.

    Attributes:
        attack, by: its name, and whose code it is.
        accuracy: share of the images still classified correctly, in points from 0 to 100.
        change: largest change of a pixel, in units of pixels from 0 to 1.
        seconds: wall-clock time of the whole.
    """

    attack: str
    by: str
    accuracy: float
    change: float
    seconds: float


@dataclass(frozen=True)
class Settings:
    """Of every attack: radius and step in units of pixels from 0 to 1; seed of random starts."""

    eps: float
    step_size: float
    steps: int
    seed: int = 0


# ---- the attacks --------------------------------------------------------------------------------


def our_pgd(model: nn.Module, settings: Settings, *, random_start: bool) -> Attack:
    """Return our PGD; random starts go on from batch to batch."""
    pgd = PGD(
        eps=settings.eps,
        step_size=settings.step_size,
        steps=settings.steps,
        random_start=random_start,
    )
    generator = torch.Generator().manual_seed(settings.seed)
    return lambda x, y: pgd.attack(
        lambda v: cross_entropy(model(v), y, reduction="sum"), x, generator=generator
    )


def their_pgd(model: nn.Module, settings: Settings, *, random_start: bool) -> Attack:
    """Return torchattacks' PGD, whose starts are of torch's global generator."""
    library: Any = importlib.import_module(PEER)
    torch.manual_seed(settings.seed)
    attack: Attack = library.PGD(
        model,
        eps=settings.eps,
        alpha=settings.step_size,
        steps=settings.steps,
        random_start=random_start,
    )
    return attack


def their_autoattack(model: nn.Module, settings: Settings, classes: int) -> Attack:
    """Return torchattacks' AutoAttack, standard version: APGD-CE, APGD-T, FAB-T and Square."""
    library: Any = importlib.import_module(PEER)
    attack: Attack = library.AutoAttack(
        model,
        norm="Linf",
        eps=settings.eps,
        version="standard",
        n_classes=classes,
        seed=settings.seed,
    )
    return attack


# ---- the evaluation -----------------------------------------------------------------------------


def row(name: str, by: str, attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> Row:
    """Attack all images, batch by batch, and classify them; say on stderr how far it is."""
    start, correct, done, change = time.perf_counter(), 0, 0, 0.0
    for clean, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        images = attack(clean, labels).detach()
        with torch.no_grad():
            correct += int((model(images).argmax(1) == labels).sum())
        change = max(change, float((images - clean).abs().max()))
        done += len(clean)
        seconds = time.perf_counter() - start
        so_far = f"{correct} of {done} images correct, {seconds:.1f} s"
        print(f"{name} {by}: {so_far}", file=sys.stderr, flush=True)
    return Row(name, by, 100 * correct / done, change, seconds)


def rows(
    model: nn.Module, x: Tensor, y: Tensor, settings: Settings, *, autoattack: bool
) -> Iterator[Row]:
    """Yield the row of every attack.

    Raises:
        PeerFailedError: torchattacks raised.
    """
    yield row("none", "", lambda images, _: images, model, x, y)
    for name, random_start in (("PGD", False), ("PGD, random start", True)):
        ours = our_pgd(model, settings, random_start=random_start)
        yield row(name, "wcmi_fast", ours, model, x, y)
        with peer_runs():
            theirs = their_pgd(model, settings, random_start=random_start)
            found = row(name, PEER, theirs, model, x, y)
        yield found
    if autoattack:
        classes = class_count(model, x, y)
        with peer_runs():
            found = row("AutoAttack", PEER, their_autoattack(model, settings, classes), model, x, y)
        yield found


def differences(found: Sequence[Row]) -> dict[str, float]:
    """Return by attack the accuracy under theirs minus that under ours, in points."""
    ours, theirs = (
        {each.attack: each.accuracy for each in found if each.by == by}
        for by in ("wcmi_fast", PEER)
    )
    return {name: theirs[name] - accuracy for name, accuracy in ours.items()}


def agree(found: Sequence[Row]) -> bool:
    """Tell whether no difference is beyond what is allowed."""
    # Both accuracies are rounded multiples of a share of the images.
    return all(abs(points) <= ALLOWED + 1e-9 for points in differences(found).values())


# ---- the run ------------------------------------------------------------------------------------


def table(found: Sequence[Row], title: str) -> Table:
    """Return the rows for the terminal."""
    made = Table("attack", "by", "accuracy, %", "largest change", "seconds", title=title)
    for each in found:
        cells = (f"{each.accuracy:.1f}", f"{each.change:.4f}", f"{each.seconds:.1f}")
        made.add_row(each.attack, each.by, *cells)
    return made


def peer_version() -> str:
    """Return the version of torchattacks."""
    return metadata.version(PEER)


def as_json(found: Sequence[Row], arguments: argparse.Namespace, settings: Settings) -> str:
    """Return everything measured, and with what."""
    content = {
        "environment": {
            **msgspec.to_builtins(environment()),
            PEER: peer_version(),
        },
        "file": str(arguments.file),
        "data": arguments.data,
        "images": arguments.images,
        "settings": asdict(settings),
        "rows": [asdict(each) for each in found],
        "differences_points": differences(found),
        "agree": agree(found),
    }
    return json.dumps(content, indent=1) + "\n"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("file", type=Path, help="of wcmi-fast export, .pt2 or .safetensors")
    made.add_argument("--data", default="fashion_mnist", help="name, or .npz file")
    made.add_argument("--images", type=_count, default=500, help="the first test images, so many")
    made.add_argument("--eps", type=_positive, default=0.1, help="pixels from 0 to 1")
    made.add_argument("--steps", type=_count, default=10)
    made.add_argument("--step-size", type=_positive, help="2.5 eps / steps if not given")
    made.add_argument("--seed", type=int, default=0, help="of the random starts")
    made.add_argument("--autoattack", action="store_true", help="AutoAttack too, many minutes")
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the attacks' settings."""
    step_size = arguments.step_size or 2.5 * arguments.eps / arguments.steps
    return Settings(arguments.eps, step_size, arguments.steps, arguments.seed)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{number} is not finite and more than 0")
    return number


def first_images(data: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the first test images in [0, 1], float32, and their labels."""
    found = datasets.load(data)
    if count > len(found.x_test):
        raise ValueError(f"outside_attacks: images is {count} of {len(found.x_test)} test images")
    return Feed(found.x_test, "cpu")[:count], found.y_test[:count]


@torch.no_grad()
def class_count(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return the number of classes that the model has logits for.

    Raises:
        ValueError: the model takes other images, or gives no logits for the labels.
    """
    try:
        logits = model(x[:1])
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"outside_attacks: data has images of shape {tuple(x.shape[1:])}, wanted those of the "
            f"file: {error}"
        ) from error
    labels = int(y.max()) + 1
    if logits.ndim != 2 or logits.shape[1] < labels:
        raise ValueError(
            f"outside_attacks: file gives outputs of shape {tuple(logits.shape)} for an image, "
            f"wanted logits for {labels} classes"
        )
    return int(logits.shape[1])


def main(argv: Sequence[str]) -> int:
    """Attack, print, write; return the exit status."""
    reader = parser()
    arguments = reader.parse_args(argv)
    settings = settings_of(arguments)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    try:
        import_peer(PEER)
        model = load_exported(arguments.file)
        x, y = first_images(arguments.data, arguments.images)
        class_count(model, x, y)
        found = list(rows(model, x, y, settings, autoattack=arguments.autoattack))
    except PeerFailedError as error:
        reader.error(f"{PEER} does not run: {error}; pip install --no-deps {PEER}")
    except (ValueError, OSError) as error:
        reader.error(str(error))
    steps = f"{settings.steps} steps of {settings.step_size:g}"
    title = f"{len(x)} test images of {arguments.data}; eps {settings.eps:g}, {steps}"
    console.print(table(found, title))
    for name, points in differences(found).items():
        console.print(f"{name}: theirs - ours = {points:+.1f} points, at most {ALLOWED:g} allowed")
    if arguments.json:
        write_file(arguments.json, as_json(found, arguments, settings))
    return int(not agree(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
