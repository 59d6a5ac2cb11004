"""The trials of a measurement: a critic of each term is trained and tested (supplement B)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from wcmi_fast.information.critic import TrainedCritic, evaluate_critic, evidence, train_critic
from wcmi_fast.information.job import Setting
from wcmi_fast.information.results import Evidence
from wcmi_fast.progress import Progress
from wcmi_fast.training.objective import Critic

Term = Literal["information", "worst_case"]


def run_trials(
    setting: Setting, terms: tuple[Term, ...], progress: Progress
) -> dict[Term, tuple[list[tuple[float, ...]], tuple[Evidence, ...]]]:
    """Return each term's values of trials x batches, and each trial's evidence.

    The critics of a trial begin as one that was trained on clean images: from a critic that knows
    nothing an attack has nothing to take, and most of a training would pass before it learns. Both
    terms begin there, so that their difference is not one of how long they were trained.
    """
    found: dict[Term, list[Mapping[str, Any]]] = {term: [] for term in terms}
    for trial in range(setting.trials):
        known = {term: _known(setting, f"{term}-{trial}") for term in terms}
        progress.say(f"trial {trial + 1} of {setting.trials}")
        first = None
        if all(known.values()):
            progress.advance(_training_work(setting, attacked=False))
        else:
            first = _train(setting, f"first-{trial}", None, progress, attacked=False).critic
        for term in terms:
            progress.say(f"{term.replace('_', ' ')}, trial {trial + 1} of {setting.trials}")
            found[term].append(known[term] or _trial(setting, term, trial, first, progress))
            if known[term]:
                progress.advance(_term_work(setting, term))
    return {
        term: (
            [tuple(each["values"]) for each in trials],
            tuple(Evidence.of(each["evidence"]) for each in trials),
        )
        for term, trials in found.items()
    }


def trial_work(setting: Setting, terms: tuple[Term, ...]) -> float:
    """Return the work of a trial, in passes forward and backward over a batch."""
    first = _training_work(setting, attacked=False)
    return first + sum(_term_work(setting, term) for term in terms)


def _known(setting: Setting, stage: str) -> Mapping[str, Any] | None:
    return None if setting.run is None else setting.run.stage_result(stage)


def _trial(
    setting: Setting, term: Term, trial: int, first: Critic | None, progress: Progress
) -> Mapping[str, Any]:
    """Train and test one critic."""
    attacked = term == "worst_case"
    trained = _train(setting, f"{term}-{trial}", first, progress, attacked=attacked)
    testing = setting.testing if attacked else None
    tested = evaluate_critic(
        setting.encoder,
        trained.critic,
        setting.x_test,
        setting.critic,
        attack=testing,
        seed=setting.job.seed,
        on_batch=lambda: progress.advance(_costs(setting, attacked=attacked)[1]),
    )
    _check_finite(setting, term, tested.values)
    seen = evidence(
        setting.encoder, trained, setting.x_train, tested, setting.critic, attack=testing
    )
    found = {"values": tested.values, "evidence": asdict(seen)}
    if setting.run is not None:
        setting.run.finish_stage(f"{term}-{trial}", found)
    return found


def _train(
    setting: Setting, stage: str, start: Critic | None, progress: Progress, *, attacked: bool
) -> TrainedCritic:
    """Train a critic from `start`, or read what an interrupted run had of it."""
    per_batch, _ = _costs(setting, attacked=attacked)
    if setting.run is not None:
        batches = len(setting.x_train) // setting.critic.batch_size
        progress.advance(setting.run.epochs_done(stage) * batches * per_batch)
    return train_critic(
        setting.encoder,
        setting.x_train,
        setting.critic,
        attack=setting.training if attacked else None,
        seed=setting.job.seed,
        start=start,
        stage=stage,
        run=setting.run,
        on_batch=lambda: progress.advance(per_batch),
    )


def _check_finite(setting: Setting, term: Term, values: Sequence[float]) -> None:
    bad = [batch for batch, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{setting.job.owner}: the {term.replace('_', ' ')} of test batch {bad[0]} is "
            f"{values[bad[0]]} with bound {setting.critic.bound!r}, wanted a finite value: try "
            "another bound, or a model whose representations are finite for all images"
        )


def _term_work(setting: Setting, term: Term) -> float:
    attacked = term == "worst_case"
    batches = len(setting.x_test) // setting.critic.batch_size
    testing = batches * _costs(setting, attacked=attacked)[1]
    return _training_work(setting, attacked=attacked) + testing


def _training_work(setting: Setting, *, attacked: bool) -> float:
    batches = len(setting.x_train) // setting.critic.batch_size
    return setting.critic.epochs * batches * _costs(setting, attacked=attacked)[0]


def _costs(setting: Setting, *, attacked: bool) -> tuple[float, float]:
    """Return the work of a training and of a test batch."""
    if not attacked:
        return 1.0, 0.5
    job = setting.job
    return 1.0 + (job.training_steps or job.steps), 0.5 + job.steps
