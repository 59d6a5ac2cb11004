"""A measurement's arguments, read: a frozen model, images, attacks, critics, a plan."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from wcmi_fast.attacks import PGD
from wcmi_fast.data import Feed
from wcmi_fast.diagnosis import versions
from wcmi_fast.files import write_file
from wcmi_fast.functional.steps import check_budget
from wcmi_fast.information.critic import Attack, CriticConfig
from wcmi_fast.information.plan import Plan, plan
from wcmi_fast.information.representation import frozen_copy
from wcmi_fast.information.source import Samples, samples
from wcmi_fast.training.run_folder import RunFolder

# Images that a measurement without a budget takes of larger data.
TRAIN_IMAGES, TEST_IMAGES = 10_000, 2_000
PLAN = "plan.json"


class Options(TypedDict, total=False):
    """Arguments that all measurements have; see `representation_vulnerability`."""

    layer: str | None
    classes: int | None
    trials: int
    seed: int
    budget: float | None
    critic: CriticConfig | None
    train_images: int | None
    test_images: int | None
    device: str | torch.device
    folder: str | Path | None
    progress: bool | None
    say: Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A measurement as the caller gave it; see `representation_vulnerability`.

    Attributes:
        owner: the public function, for errors.
        eps: radius of the attack; None measures plain information only.
    """

    owner: str
    model: nn.Module
    data: Any
    critic: CriticConfig
    eps: float | None = None
    steps: int = 10
    step_size: float | None = None
    training_steps: int | None = None
    attack: Attack | None = None
    head: nn.Module | None = None
    classes: int | None = None
    layer: str | None = None
    trials: int = 4
    seed: int = 0
    budget: float | None = None
    train_images: int | None = TRAIN_IMAGES
    test_images: int | None = TEST_IMAGES
    device: str | torch.device = "cpu"
    folder: Path | None = None
    progress: bool | None = None
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a job measures.

    Attributes:
        job: as given.
        encoder: the representation, a frozen copy on the device.
        found: images and labels.
        x_train, x_test: the images, on the device.
        training, testing: the attacks, or None for plain information.
        critic: as given, or as planned.
        trials: as given, or as planned.
        run: folder of checkpoints, or None.
    """

    job: Job
    encoder: nn.Module
    found: Samples
    x_train: Feed
    x_test: Feed
    training: Attack | None
    testing: Attack | None
    critic: CriticConfig
    trials: int
    run: RunFolder | None


def read(job: Job) -> Setting:
    """Read a job, plan it if it has a budget, and claim its folder.

    Raises:
        TypeError, ValueError: arguments that cannot be measured, named.
    """
    _check(job)
    found = samples(job.owner, job.data, job.seed)
    found = found.drawn(job.train_images, job.test_images, job.seed)
    _check_count(job, found)
    x_test = Feed(found.x_test, job.device)
    clip = _clip(found.x_test)
    setting = Setting(
        job=job,
        encoder=_encoder(job, x_test[:2]),
        found=found,
        x_train=Feed(found.x_train, job.device),
        x_test=x_test,
        training=attack_of(job, job.training_steps or job.steps, clip),
        testing=attack_of(job, job.steps, clip),
        critic=job.critic,
        trials=job.trials,
        run=None if job.folder is None else RunFolder(job.folder),
    )
    _try_model(setting)
    if setting.run is not None:
        # Before the plan, which depends on the machine's speed: the same call finds its folder.
        setting.run.claim(job.owner, settings_of(setting))
    if job.budget is not None:
        setting = _with_plan(setting, _planned(setting, job.budget))
    return setting


def attack_of(job: Job, steps: int, clip: tuple[float, float]) -> Attack | None:
    """Return a job's attack, or PGD with so many steps; None for plain information."""
    if job.eps is None or job.attack is not None:
        return job.attack
    # Madry's rule. Fewer steps in training are longer, so that they reach as far. Where eps is 0
    # the step size does not matter, but must not be 0.
    path = 2.5 * job.eps if job.step_size is None else job.step_size * job.steps
    return PGD(eps=job.eps, step_size=path / steps or 1.0, steps=steps, clip=clip)


def settings_of(setting: Setting) -> dict[str, Any]:
    """Return all that a measurement's numbers depend on, as plain values."""
    job = setting.job
    return {
        "measured": job.owner,
        "model": type(job.model).__name__,
        "model_sha256": digest_of(setting.encoder.state_dict().values()),
        "layer": job.layer,
        "data": setting.found.name,
        "data_sha256": digest_of((setting.found.x_train, setting.found.x_test)),
        "train_images": len(setting.x_train),
        "test_images": len(setting.x_test),
        **_attack_settings(setting),
        **asdict(setting.critic),
        "trials": setting.trials,
        "seed": job.seed,
        "budget_minutes": job.budget,
        "device": str(job.device),
        **versions(),
    }


def _attack_settings(setting: Setting) -> dict[str, Any]:
    attack, training = setting.testing, setting.training
    if attack is None:
        return {}
    if not isinstance(attack, PGD):
        return {"eps": setting.job.eps, "attack": type(attack).__name__}
    found = {"attack": "PGD", **asdict(attack), "training_steps": attack.steps}
    if isinstance(training, PGD):
        found |= {"training_steps": training.steps, "training_step_size": training.step_size}
    found["clip"] = [str(end) if math.isinf(end) else end for end in attack.clip]
    return found


def digest_of(tensors: Iterable[object]) -> str:
    """Return the first digits of a hash of tensors' values; a module's extra state is none."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            rows = tensor.detach().cpu().contiguous().flatten()
            digest.update(rows.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _check(job: Job) -> None:
    if not isinstance(job.model, nn.Module):
        raise TypeError(f"{job.owner}: model is a {type(job.model).__name__}, wanted an nn.Module")
    for name in ("trials", "steps", "training_steps", "train_images", "test_images", "classes"):
        value = getattr(job, name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"{job.owner}: {name} is {value!r}, wanted an integer, 1 or more")
    if isinstance(job.seed, bool) or not isinstance(job.seed, int):
        raise TypeError(f"{job.owner}: seed is {job.seed!r}, wanted an integer")
    for name in ("eps", "step_size", "budget"):
        value = getattr(job, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"{job.owner}: {name} is {value!r}, wanted a number")
    if job.budget is not None and not 0 < job.budget < math.inf:
        raise ValueError(f"{job.owner}: budget is {job.budget}, wanted minutes > 0, or None")
    if job.eps is not None and job.attack is None:
        step_size = 1.0 if job.step_size is None else job.step_size
        check_budget(job.owner, job.eps, step_size, (0.0, 1.0))
    _check_device(job)


def _check_device(job: Job) -> None:
    try:
        torch.empty(0, device=job.device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{job.owner}: device is {str(job.device)!r}, wanted one that torch can use here, such "
            f"as 'cpu' ({reason})"
        ) from error


def _clip(x: Tensor) -> tuple[float, float]:
    """Return the range of an attacked image; vectors of floats have none."""
    return (-math.inf, math.inf) if x.ndim == 2 and x.is_floating_point() else (0.0, 1.0)


def _check_count(job: Job, found: Samples) -> None:
    size = job.critic.batch_size
    for name, rows in (("training", found.x_train), ("test", found.x_test)):
        if len(rows) < size:
            raise ValueError(
                f"{job.owner}: data has {len(rows)} {name} images, wanted at least a batch of "
                f"{size} (critic=CriticConfig(batch_size=...))"
            )


def _encoder(job: Job, like: Tensor) -> nn.Module:
    try:
        return frozen_copy(job.model, job.layer, like)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{job.owner}: {error}") from error


def _try_model(setting: Setting) -> None:
    """Run the model on two images, so that what does not fit is said at once."""
    try:
        with torch.no_grad():
            found: Tensor = setting.encoder(setting.x_test[:2])
    except Exception as error:  # whatever a user's model raises
        raise ValueError(
            f"{setting.job.owner}: model does not map images of shape "
            f"{tuple(setting.x_test.shape[1:])} to a representation: {error}"
        ) from error
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"{setting.job.owner}: model returned NaN or infinite values for the first test "
            "images, wanted finite representations"
        )


def _planned(setting: Setting, minutes: float) -> Plan:
    """Return the plan of the folder, or a new one, which depends on the machine's speed."""
    run = setting.run
    if run is not None and (run.path / PLAN).exists():
        planned = Plan(**json.loads((run.path / PLAN).read_text()))
        setting.job.say(f"{planned} (as begun)")
        return planned
    planned = plan(
        setting.encoder,
        setting.x_train,
        setting.x_test,
        setting.critic,
        training=setting.training,
        testing=setting.testing,
        trials=setting.trials,
        minutes=minutes,
    )
    if run is not None:
        write_file(run.path / PLAN, json.dumps(asdict(planned), indent=1) + "\n")
    excess = ", more than the budget: nothing smaller says anything"
    setting.job.say(f"{planned}{excess if planned.seconds > 60 * minutes else ''}")
    return planned


def _with_plan(setting: Setting, planned: Plan) -> Setting:
    found = setting.found.first(planned.train_images, planned.test_images)
    return replace(
        setting,
        found=found,
        x_train=Feed(found.x_train, setting.job.device),
        x_test=Feed(found.x_test, setting.job.device),
        critic=replace(setting.critic, epochs=planned.epochs),
        trials=planned.trials,
    )
