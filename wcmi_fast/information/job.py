"""A measurement's arguments, read: a frozen model, images, attacks, critics, a plan."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
    found = _first(found, job.train_images, job.test_images)
    _check_images(job, found)
    setting = Setting(
        job=job,
        encoder=_encoder(job),
        found=found,
        x_train=Feed(found.x_train, job.device),
        x_test=Feed(found.x_test, job.device),
        training=attack_of(job, job.training_steps or job.steps),
        testing=attack_of(job, job.steps),
        critic=job.critic,
        trials=job.trials,
        run=None if job.folder is None else RunFolder(job.folder),
    )
    _try_model(setting)
    if job.budget is not None:
        setting = _with_plan(setting, _planned(setting, job.budget))
    if setting.run is not None:
        setting.run.claim(job.owner, settings_of(setting))
    return setting


def attack_of(job: Job, steps: int) -> Attack | None:
    """Return a job's attack, with so many steps if it is PGD; None for plain information."""
    if job.eps is None or job.attack is not None:
        return job.attack
    return pgd_of(job, steps)


def pgd_of(job: Job, steps: int) -> PGD:
    """Return projected gradient descent with a job's eps, crossing the ball in so many steps."""
    eps = job.eps or 0.0
    if job.step_size is None:
        # Madry's rule; where eps is 0 the step size does not matter, but must not be 0.
        return PGD(eps=eps, step_size=2.5 * eps / steps or 1.0, steps=steps)
    return PGD(eps=eps, step_size=job.step_size * job.steps / steps, steps=steps)


def settings_of(setting: Setting) -> dict[str, Any]:
    """Return all that a measurement's numbers depend on, as plain values."""
    job = setting.job
    return {
        "measured": job.owner,
        "model": type(job.model).__name__,
        "model_sha256": _digest(setting.encoder.state_dict().values()),
        "layer": job.layer,
        "data": setting.found.name,
        "data_sha256": _digest((setting.found.x_train, setting.found.x_test)),
        "train_images": len(setting.x_train),
        "test_images": len(setting.x_test),
        **_attack_settings(job, setting.testing),
        **asdict(setting.critic),
        "trials": setting.trials,
        "seed": job.seed,
        "budget_minutes": job.budget,
        "device": str(job.device),
        **versions(),
    }


def _attack_settings(job: Job, attack: Attack | None) -> dict[str, Any]:
    if attack is None:
        return {}
    if not isinstance(attack, PGD):
        return {"eps": job.eps, "attack": type(attack).__name__}
    return {
        "attack": "PGD",
        "eps": attack.eps,
        "steps": attack.steps,
        "step_size": attack.step_size,
        "training_steps": job.training_steps or attack.steps,
    }


def _digest(tensors: Any) -> str:
    """Return the first digits of a hash of tensors' values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
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
    if job.budget is not None and not 0 < job.budget < math.inf:
        raise ValueError(f"{job.owner}: budget is {job.budget}, wanted minutes > 0, or None")
    if job.eps is not None and job.attack is None:
        step_size = 1.0 if job.step_size is None else job.step_size
        check_budget(job.owner, job.eps, step_size, (0.0, 1.0))


def _first(found: Samples, train: int | None, test: int | None) -> Samples:
    """Return so many training and test images."""
    return found._replace(
        x_train=found.x_train[:train],
        x_test=found.x_test[:test],
        y_train=None if found.y_train is None else found.y_train[:train],
        y_test=None if found.y_test is None else found.y_test[:test],
    )


def _check_images(job: Job, found: Samples) -> None:
    size = job.critic.batch_size
    for name, rows in (("training", found.x_train), ("test", found.x_test)):
        if len(rows) < size:
            raise ValueError(
                f"{job.owner}: data has {len(rows)} {name} images, wanted at least a batch of "
                f"{size} (critic=CriticConfig(batch_size=...))"
            )
        if rows.ndim == 4 and rows.is_floating_point():
            low, high = (float(end) for end in torch.aminmax(rows))
            if low < 0 or high > 1:
                raise ValueError(
                    f"{job.owner}: data's {name} images range from {low} to {high}, wanted values "
                    "in [0, 1], or uint8; normalise inside the model"
                )


def _encoder(job: Job) -> nn.Module:
    try:
        return frozen_copy(job.model, job.layer).to(job.device)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{job.owner}: {error}") from error


def _try_model(setting: Setting) -> None:
    """Run the model on two images, so that what does not fit is said at once."""
    try:
        with torch.no_grad():
            found: Tensor = setting.encoder(setting.x_test[:2])
    except (TypeError, ValueError, RuntimeError) as error:
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
    job, run = setting.job, setting.run
    file = None if run is None else run.path / PLAN
    if file is not None and file.exists():
        planned = Plan(**json.loads(file.read_text()))
    else:
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
    if file is not None:
        write_file(file, json.dumps(asdict(planned), indent=1) + "\n")
    job.say(str(planned))
    return planned


def _with_plan(setting: Setting, planned: Plan) -> Setting:
    found = _first(setting.found, planned.train_images, planned.test_images)
    return replace(
        setting,
        found=found,
        x_train=Feed(found.x_train, setting.job.device),
        x_test=Feed(found.x_test, setting.job.device),
        critic=replace(setting.critic, epochs=planned.epochs),
        trials=planned.trials,
    )
