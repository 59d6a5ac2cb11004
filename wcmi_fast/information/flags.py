"""Reasons to doubt a measurement, each seen in its own numbers; explained in docs/measuring.md."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, stdev

from wcmi_fast.information.results import Estimate, Evidence, Flag

TERMS = {"information": "information", "worst_case": "worst-case information"}

# A value within 1 nat of infonce's limit log N lies 0.46 nats or more below the information: the
# value v of a perfect critic is I - log(1 + e^I / N), so that I - v = -log(1 - e^v / N).
INFONCE_MARGIN = 1.0
# The other bounds average exp(T) over P negative pairs. For a perfect critic the relative error of
# that average is at least sqrt((e^I - 1) / P): a third where I is log 10 below log P.
AVERAGE_MARGIN = math.log(10)
# A tenth of a value is what the intervals of a usual measurement resolve, and 0.05 nats move
# theorem 3.4's bound by two points with ten classes.
GAP_SHARE, GAP_NATS = 0.1, 0.05
# Standard errors; a smaller gap is within the batches' spread.
GAP_ERRORS = 2.0
# Nats; smaller drops vanish in a table of three decimals.
NO_DROP = 1e-3
# The part of an attack's whole drop that one of its last two steps still takes. If drops shrink
# geometrically, 2 % a step means that about a tenth of the drop is still to come.
LAST_STEP = 0.02
# Images; single ones without gradient occur in networks of ReLUs and do not move a mean.
ZERO_GRADIENTS = 0.01
# Scores with a standard deviation s give a value of at most about s^2 / 2 nats: here 5e-5.
CONSTANT_SCORES = 0.01
# Of fewer batches, nobody sees whether their values are skewed, and intervals then cover less.
TEST_BATCHES = 10
# Critics of Fashion-MNIST classifiers' logits found half the nats with 10 batches of training
# images that they found with 40, in as many epochs.
TRAIN_BATCHES = 20
# The part of a value that the last epoch still added, and nats, below which it is noise.
RISING_SHARE, RISING_NATS = 0.05, 0.02
# The learning rate is then still above 85 % of its first value: what follows was no progress.
EARLY_SHARE = 0.25
# Nats that unequal classes take from log K: theorem 3.4's bound is then 2 points too low or more
# with ten classes.
ENTROPY_MARGIN = 0.05


def flags(
    *,
    information: Estimate | None,
    worst_case: Estimate | None,
    vulnerability: Estimate | None,
    evidence: Mapping[str, Sequence[Evidence]],
    batch_size: int,
    train_images: int,
    test_images: int,
    unequal_batches: bool,
    dropped_images: int,
    stochastic: bool,
    batch_norms_in_train_mode: int,
    batch_norms_without_statistics: int,
    bound: str,
    negatives: int | None,
    blind: float = 0.0,
    accuracy_bound: float | None = None,
    adversarial_accuracy: float | None = None,
    class_entropy: float | None = None,
    classes: int | None = None,
) -> tuple[Flag, ...]:
    """Return every reason to doubt a measurement that its numbers show.

    Args:
        information, worst_case, vulnerability: the estimates, or None.
        evidence: of each trial, for "information" and "worst_case".
        batch_size: images per batch.
        train_images, test_images: how many were used.
        unequal_batches: whether a loader gave batches of different sizes.
        dropped_images: test images that fill no batch.
        stochastic: whether the same images gave different representations.
        batch_norms_in_train_mode: number of the model's batch norms that were in train mode.
        batch_norms_without_statistics: number of those that always use the batch's statistics.
        bound, negatives: as in `CriticConfig`.
        blind: share of images at which a gradient attack sees no gradient of the representation.
        accuracy_bound, adversarial_accuracy: theorem 3.4's, and the measured one, in [0, 1].
        class_entropy: of the test images' labels, in nats.
        classes: number K of classes.
    """
    named = {"information": information, "worst_case": worst_case}
    estimates = {term: estimate for term, estimate in named.items() if estimate is not None}
    found: list[Flag | None] = []
    for term, estimate in estimates.items():
        seen = evidence.get(term, ())
        found += [
            near_log_n(term, estimate.mean, bound=bound, n=batch_size, negatives=negatives),
            negative(term, estimate),
            critic_gap(term, estimate, seen),
            collapsed_critic(term, seen),
            undertrained_critic(term, seen),
            early_critic(term, seen, train_images // batch_size),
        ]
    attacked = evidence.get("worst_case", ())
    found += [
        attack_without_effect(attacked),
        attack_unfinished(attacked),
        zero_gradients(attacked, blind),
        nonfinite_gradients(attacked),
        worst_above_normal(vulnerability),
        accuracy_above_bound(accuracy_bound, adversarial_accuracy),
        unequal_classes(accuracy_bound, class_entropy, classes),
        few_samples(train_images, test_images, batch_size),
        one_trial(estimates.values()),
        unequal_batches_given(unequal_batches, batch_size),
        dropped(dropped_images, batch_size),
        stochastic_model(stochastic),
        batch_norm_in_train_mode(batch_norms_in_train_mode),
        batch_norm_without_statistics(batch_norms_without_statistics),
    ]
    return tuple(flag for flag in found if flag is not None)


def near_log_n(
    term: str, value: float, *, bound: str, n: int, negatives: int | None = None
) -> Flag | None:
    """Tell whether a value is near what a batch of n images can show at most.

    Args:
        term: what the value is of, "information" or "worst_case"; or any words.
        value: the estimate, in nats.
        bound, negatives: as in `CriticConfig`.
        n: images per batch.
    """
    if bound == "infonce":
        pairs, margin = (n if negatives is None else negatives + 1), INFONCE_MARGIN
        what = f"log {pairs}, which infonce cannot exceed with {pairs} candidates"
    else:
        pairs, margin = n * (negatives or n - 1), AVERAGE_MARGIN
        what = f"log {pairs}, the most that an average over {pairs} negative pairs can resolve"
    limit = math.log(pairs)
    if value < limit - margin:
        return None
    return Flag(
        "near_log_n",
        f"The {_words(term)}, {value:.3f} nats, is within {margin:.1f} nats of {limit:.3f} = "
        f"{what}: the true value may be far larger.",
    )


def negative(term: str, estimate: Estimate) -> Flag | None:
    """Tell whether an estimate is below 0 by more than its error."""
    high = estimate.mean if math.isnan(estimate.interval[1]) else estimate.interval[1]
    if not high < 0:
        return None
    return Flag(
        "negative",
        f"The {_words(term)}, {estimate.mean:.3f} nats, is below 0 with all of its interval: "
        "information is not negative, so that the critic is one that fails here, and a "
        "vulnerability made with it is too large.",
    )


def critic_gap(term: str, estimate: Estimate, seen: Sequence[Evidence]) -> Flag | None:
    """Tell whether critics do better on their training images than on test images."""
    if not seen:
        return None
    train, test = (fmean(e.train_value for e in seen), fmean(e.test_value for e in seen))
    columns = [fmean(column) for column in zip(*estimate.batches, strict=True)]
    # The training value is of a few batches; all trials look at the same ones.
    error = stdev(columns) * math.sqrt(1 / 4 + 1 / len(columns)) if len(columns) > 1 else 0.0
    if not train - test > max(GAP_SHARE * abs(train), GAP_ERRORS * error, GAP_NATS):
        return None
    return Flag(
        "critic_gap",
        f"The critics of the {_words(term)} reach {train:.3f} nats on their training images and "
        f"{test:.3f} on the test images: they know the former by heart, and the value is too low.",
    )


def collapsed_critic(term: str, seen: Sequence[Evidence]) -> Flag | None:
    """Tell whether a critic's scores do not depend on what is paired with what."""
    spreads = [e.score_spread for e in seen if not e.score_spread >= CONSTANT_SCORES]
    if not spreads:
        return None
    return Flag(
        "collapsed_critic",
        f"{len(spreads)} of {len(seen)} critics of the {_words(term)} score right and wrong pairs "
        f"of a batch alike (standard deviation {min(spreads):.2g}): 0 nats then say that the "
        "critic found nothing, and not that there is nothing.",
    )


def undertrained_critic(term: str, seen: Sequence[Evidence]) -> Flag | None:
    """Tell whether the critics were still getting better when their training ended."""
    curves = [e.curve for e in seen if len(e.curve) > 1]
    if not curves:
        return None
    last, rise = fmean(c[-1] for c in curves), fmean(c[-1] - c[-2] for c in curves)
    if not rise > max(RISING_SHARE * abs(last), RISING_NATS):
        return None
    return Flag(
        "undertrained_critic",
        f"The critics of the {_words(term)} gained {rise:.3f} nats in their last epoch, to "
        f"{last:.3f}: more epochs would find more.",
    )


def early_critic(term: str, seen: Sequence[Evidence], batches_per_epoch: int) -> Flag | None:
    """Tell whether the critic that was kept is one of the first."""
    early = [
        e.best_batch for e in seen if e.best_batch < EARLY_SHARE * len(e.curve) * batches_per_epoch
    ]
    if not early:
        return None
    return Flag(
        "early_critic",
        f"{len(early)} of {len(seen)} kept critics of the {_words(term)} are of the first quarter "
        f"of training (batch {min(early)} of {len(seen[0].curve) * batches_per_epoch}): what came "
        "after it was worse.",
    )


def attack_without_effect(seen: Sequence[Evidence]) -> Flag | None:
    """Tell whether the attack did not lower the value of its batches."""
    if not (paths := _paths(seen, 2)):
        return None
    first, last = fmean(p[0] for p in paths), fmean(p[-1] for p in paths)
    if not first - last < NO_DROP:
        return None
    return Flag(
        "attack_without_effect",
        f"The attack led from {first:.3f} to {last:.3f} nats, no lower: the worst-case value is "
        "that of unattacked images.",
    )


def attack_unfinished(seen: Sequence[Evidence]) -> Flag | None:
    """Tell whether the attack still lowered the value at its last steps."""
    if not (paths := _paths(seen, 3)):
        return None
    drop = fmean(p[0] - p[-1] for p in paths)
    if drop < NO_DROP:
        return None
    # Of two steps, because steps by the gradient's sign swing to and fro.
    last = fmean((p[-3] - p[-1]) / 2 for p in paths)
    if not last > max(LAST_STEP * drop, NO_DROP):
        return None
    return Flag(
        "attack_unfinished",
        f"The attack's last two steps lowered the value by {last:.3f} nats each, of {drop:.3f} in "
        f"{len(paths[0]) - 1} steps: more steps would find a lower worst case.",
    )


def zero_gradients(seen: Sequence[Evidence], blind: float) -> Flag | None:
    """Tell whether the attack saw images without a gradient."""
    share = max([blind, *(e.zero_gradients for e in seen)])
    if not share > ZERO_GRADIENTS:
        return None
    return Flag(
        "zero_gradients",
        f"The gradient that the attack follows, or the representation's part of it, is zero for "
        f"{100 * share:.1f} % of the images: the attack is blind there, and the vulnerability too "
        "small.",
    )


def nonfinite_gradients(seen: Sequence[Evidence]) -> Flag | None:
    """Tell whether the attack saw gradients that are NaN or infinite."""
    share = max((e.nonfinite_gradients for e in seen), default=0.0)
    if not share > 0:
        return None
    return Flag(
        "nonfinite_gradients",
        f"{100 * share:.2g} % of the gradients' elements are NaN or infinite: the attack leaves "
        "those pixels where they are.",
    )


def worst_above_normal(vulnerability: Estimate | None) -> Flag | None:
    """Tell whether the worst-case value lies above that of clean images."""
    if vulnerability is None or not vulnerability.mean < 0:
        return None
    low, high = vulnerability.interval
    return Flag(
        "worst_above_normal",
        f"The worst-case value lies {-vulnerability.mean:.3f} nats above that of clean images "
        f"(vulnerability {low:.3f} to {high:.3f}): a minimum cannot, so that the critics of clean "
        "images are worse or chance decides.",
    )


def accuracy_above_bound(bound: float | None, accuracy: float | None) -> Flag | None:
    """Tell whether a classifier does better under attack than theorem 3.4 allows."""
    if bound is None or accuracy is None or not accuracy > bound:
        return None
    return Flag(
        "accuracy_above_bound",
        f"The measured adversarial accuracy, {100 * accuracy:.1f} %, is above theorem 3.4's "
        f"bound, {100 * bound:.1f} %: the worst-case information is estimated too low, or the "
        "attack on the classifier was too weak.",
    )


def unequal_classes(bound: float | None, entropy: float | None, classes: int | None) -> Flag | None:
    """Tell whether classes are not equally likely, as theorem 3.4 supposes."""
    if bound is None or entropy is None or classes is None:
        return None
    whole = math.log(classes)
    if not whole - entropy > ENTROPY_MARGIN:
        return None
    return Flag(
        "unequal_classes",
        f"The labels' entropy is {entropy:.3f} nats and not log {classes} = {whole:.3f}: theorem "
        f"3.4 supposes equally likely classes, and its bound may be too low by "
        f"{100 * (whole - entropy) / whole:.1f} points.",
    )


def few_samples(train_images: int, test_images: int, batch_size: int) -> Flag | None:
    """Tell whether there are too few images for critics, or for an interval."""
    train, test = train_images // batch_size, test_images // batch_size
    if train >= TRAIN_BATCHES and test >= TEST_BATCHES:
        return None
    return Flag(
        "few_samples",
        f"{train_images} training and {test_images} test images are {train} and {test} batches of "
        f"{batch_size}, wanted {TRAIN_BATCHES} and {TEST_BATCHES} at least: critics learn too "
        "little, or the interval is too narrow.",
    )


def one_trial(estimates: Collection[Estimate]) -> Flag | None:
    """Tell whether an interval lacks the error of training."""
    if not estimates or any(len(e.batches) > 1 for e in estimates):
        return None
    return Flag(
        "one_trial",
        "There was 1 trial: the interval says how far test batches differ, and nothing of how far "
        "critics trained anew differ.",
    )


def unequal_batches_given(unequal: bool, batch_size: int) -> Flag | None:
    """Tell whether a loader's batches had different sizes."""
    if not unequal:
        return None
    return Flag(
        "unequal_batches",
        f"The loader's batches were of different sizes; its images were cut anew into batches of "
        f"{batch_size}, because a value depends on the size.",
    )


def dropped(images: int, batch_size: int) -> Flag | None:
    """Tell whether test images were left out."""
    if not images:
        return None
    return Flag(
        "dropped_images",
        f"{images} test image{'s' if images > 1 else ''} did not fill a batch of {batch_size} and "
        "were left out of the estimates.",
    )


def stochastic_model(stochastic: bool) -> Flag | None:
    """Tell whether the model maps the same images to different representations."""
    if not stochastic:
        return None
    return Flag(
        "stochastic_model",
        "The model, in eval mode, maps the same images to different representations: the attack "
        "follows the gradient of one draw, and is weaker than one that averages.",
    )


def batch_norm_in_train_mode(norms: int) -> Flag | None:
    """Tell whether a model was given in train mode."""
    if not norms:
        return None
    return Flag(
        "batch_norm_in_train_mode",
        f"{norms} batch norm{'s' if norms > 1 else ''} of the model were in train mode; a copy in "
        "eval mode was measured, with the running statistics as they are.",
    )


def batch_norm_without_statistics(norms: int) -> Flag | None:
    """Tell whether a representation depends on the other images of its batch."""
    if not norms:
        return None
    return Flag(
        "batch_norm_without_statistics",
        f"{norms} batch norm{'s' if norms > 1 else ''} of the model use the batch's statistics "
        "also in eval mode: the representation of an image depends on the other images.",
    )


def _paths(seen: Sequence[Evidence], length: int) -> list[tuple[float, ...]]:
    return [e.trace for e in seen if len(e.trace) >= length]


def _words(term: str) -> str:
    return TERMS.get(term, term)
