"""Information, worst-case information and vulnerability of all neurons of a layer in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from wcmi_fast.information.critic import CriticConfig
from wcmi_fast.information.job import TEST_IMAGES, TRAIN_IMAGES, Job, Setting, read, settings_of
from wcmi_fast.information.neuron_critics import evaluate_neuron_critics, train_neuron_critics
from wcmi_fast.information.patches import PatchNeurons
from wcmi_fast.information.results import CAVEAT, Estimate
from wcmi_fast.progress import Progress, shown
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Term = Literal["information", "worst_case"]
TERMS: tuple[Term, ...] = ("information", "worst_case")
OWNER = "neuron_information"
LAYER = "convolutions.4"
QUANTITIES = {
    "information": "information",
    "worst_case": "worst-case information",
    "vulnerability": "vulnerability",
}
CRITIC = CriticConfig(units=64, epochs=2, batch_size=100, learning_rate=1e-2)


@dataclass(frozen=True)
class PerNeuron:
    """A quantity of each of M neurons, in nats.

    Attributes:
        mean: (M,), over trials and test batches.
        standard_error: (M,), of the trials' means; of the batches where there is one trial; NaN for
            one batch of one trial.
        average: the mean over the neurons, with its interval.
    """

    mean: tuple[float, ...]
    standard_error: tuple[float, ...]
    average: Estimate

    @staticmethod
    def of(values: Tensor) -> PerNeuron:
        """Summarise values (trials, batches, M), in nats."""
        spread = values.mean(1) if len(values) > 1 else values[0]
        error = spread.std(0) / math.sqrt(len(spread)) if len(spread) > 1 else spread[0] * math.nan
        return PerNeuron(
            tuple(values.mean((0, 1)).tolist()),
            tuple(error.tolist()),
            Estimate.of(values.mean(2).tolist()),
        )


@dataclass(frozen=True, kw_only=True)
class NeuronReport:
    """What was measured of a layer's neurons.

    Attributes:
        neurons: their M numbers.
        information: I(X; z_k), X a patch and z_k the neuron's value on it.
        worst_case: the least I(X'; z_k) that each neuron's own attack found.
        vulnerability: information minus worst_case, paired batch by batch.
        settings: all that the numbers depend on, and versions; plain values.
        seconds: time that the measurement took.
        caveat: what the numbers are not.
    """

    neurons: tuple[int, ...]
    information: PerNeuron
    worst_case: PerNeuron
    vulnerability: PerNeuron
    settings: Mapping[str, Any]
    seconds: float
    caveat: str = field(default=CAVEAT)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings."""
        return asdict(self)

    def plot(self) -> Figure:
        """Return histograms of the neurons' information and vulnerability.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return histograms({str(self.settings["layer"]): self.to_dict()})


def neuron_information(
    model: nn.Module,
    data: Any,
    *,
    eps: float,
    layer: str = LAYER,
    neurons: Sequence[int] | None = None,
    steps: int = 10,
    step_size: float | None = None,
    training_steps: int | None = None,
    trials: int = 4,
    seed: int = 0,
    critic: CriticConfig = CRITIC,
    train_images: int | None = TRAIN_IMAGES,
    test_images: int | None = TEST_IMAGES,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> NeuronReport:
    """Measure I, worst-case I and RV of every neuron of a layer, in nats, in one batched run.

    A neuron is a kernel of a convolutional layer, seen as a function of the image patch in its
    receptive field (`PatchNeurons`). Its score of pairing the value z_k of patch i with patch j is
    z_k[i] * h_k[j]: the critic of z is the identity, and the neuron has a local critic h_k of its
    own. A batch has one patch of each image, at a random location; the bound is dv. In the worst
    case each neuron has an attack of its own, which perturbs the patches within eps; pixels outside
    the image, which the padding makes 0, stay 0. The authors' code perturbs whole images, the same
    for all neurons, and looks at values behind the ReLU.

    Args:
        model: images (N, C, H, W), float32 in [0, 1]; copied, and measured in eval mode.
        data: as for `representation_vulnerability`.
        eps: radius of the attacks in the l-infinity norm, in units of the images, 0 or more.
        layer: as for `PatchNeurons`. "convolutions.4", the batch norm of Baseline-H's second layer,
            gives values of about mean 0 and variance 1, which suits a score linear in z;
            "convolutions.3" gives what comes before it, and "convolutions.5" after the ReLU.
        neurons: numbers of the kernels; None is all of them.
        steps: attack steps.
        step_size: of the attack; None is 2.5 eps / steps.
        training_steps: attack steps while worst-case critics are trained; None is steps.
        trials: how often critics are trained anew.
        seed: decides the critics' weights and which patches are drawn; a neuron's part of it does
            not depend on which others there are.
        critic: how to train critics; units are those of the hidden layer, the bound is "dv", and
            all pairs of a batch are used.
        train_images: at most so many are used; None is all.
        test_images: at most so many are used; None is all.
        device: where to compute.
        folder: for checkpoints after every epoch; a second call with the same arguments goes on
            where an interrupted one was.
        progress: whether to show a progress bar on stderr; None does on a terminal.

    Returns:
        The report. Estimates from held-out patches may be slightly below 0.

    Raises:
        TypeError, ValueError: a model, data or settings that cannot be measured; a folder of
            another measurement.
        FloatingPointError: a neuron had no finite value.
        OSError: the folder cannot be written to, or the disk is full.

    Equivalent torch program, for one batch of patches x and one neuron::

        T = z[:, None] * h(x)[None]; off = ~torch.eye(N, dtype=torch.bool)
        T.diagonal().mean() - T[off].logsumexp(0) + math.log(N * (N - 1))

    Source: Zhu et al. 2020, figure 3; spec section 5.
    """
    start = time.monotonic()
    _check(critic)
    setting = read(
        Job(
            owner=OWNER,
            model=model,
            data=data,
            critic=critic,
            eps=eps,
            steps=steps,
            step_size=step_size,
            training_steps=training_steps,
            layer=layer,
            trials=trials,
            seed=seed,
            train_images=train_images,
            test_images=test_images,
            device=device,
        )
    )
    functions = _functions(setting, layer)
    chosen = _chosen(neurons, functions.count)
    settings = {**settings_of(setting), "neurons": chosen.tolist()}
    run = None if folder is None else RunFolder(Path(folder))
    if run is not None:
        run.claim(OWNER, settings)
    study = _Study(setting, functions, chosen, run)
    with shown(progress, sum(study.work(term) for term in TERMS)) as bar:
        found = {term: study.measured(term, bar) for term in TERMS}
    return NeuronReport(
        neurons=tuple(chosen.tolist()),
        information=PerNeuron.of(found["information"]),
        worst_case=PerNeuron.of(found["worst_case"]),
        vulnerability=PerNeuron.of(found["information"] - found["worst_case"]),
        settings=settings,
        seconds=time.monotonic() - start,
    )


@dataclass(frozen=True)
class _Study:
    setting: Setting
    functions: PatchNeurons
    neurons: Tensor
    run: RunFolder | None

    def measured(self, term: Term, bar: Progress) -> Tensor:
        """Return a term's values (trials, batches, M), in nats."""
        trials = []
        for trial in range(self.setting.trials):
            bar.say(f"{term.replace('_', ' ')}, trial {trial + 1} of {self.setting.trials}")
            trials.append(self._trial(term, f"{term}-{trial}", bar))
        return torch.tensor(trials, dtype=torch.float64)

    def work(self, term: Term) -> float:
        """Return the work of a term, in passes of one batch forward and backward."""
        return self.setting.trials * self._trial_work(term)

    def _trial(self, term: Term, stage: str, bar: Progress) -> list[list[float]]:
        """Train and test the critics once, or read what an interrupted run had found."""
        known = None if self.run is None else self.run.stage_result(stage)
        if known is None:
            known = {"values": self._trained_and_tested(term, stage, bar).tolist()}
            if self.run is not None:
                self.run.finish_stage(stage, known)
        else:
            bar.advance(self._trial_work(term))
        values: list[list[float]] = known["values"]
        return values

    def _trained_and_tested(self, term: Term, stage: str, bar: Progress) -> Tensor:
        setting = self.setting
        attacked = term == "worst_case"
        per_train, per_test = self._costs(term)
        critics = train_neuron_critics(
            self.functions,
            self.neurons,
            setting.x_train,
            setting.critic,
            attack=setting.training if attacked else None,
            seed=setting.job.seed,
            stage=stage,
            run=self.run,
            on_batch=lambda: bar.advance(per_train),
        )
        return evaluate_neuron_critics(
            self.functions,
            critics,
            setting.x_test,
            setting.critic,
            attack=setting.testing if attacked else None,
            seed=setting.job.seed,
            on_batch=lambda: bar.advance(per_test),
        )

    def _costs(self, term: Term) -> tuple[float, float]:
        if term == "information":
            return 1.0, 0.5
        job = self.setting.job
        return 1.0 + 3.0 * (job.training_steps or job.steps), 0.5 + 3.0 * job.steps

    def _trial_work(self, term: Term) -> float:
        per_train, per_test = self._costs(term)
        size, epochs = self.setting.critic.batch_size, self.setting.critic.epochs
        train, test = len(self.setting.x_train) // size, len(self.setting.x_test) // size
        return epochs * train * per_train + test * per_test


def histograms(neurons: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Return histograms of information, worst-case information and vulnerability.

    Args:
        neurons: `NeuronReport.to_dict` of each layer or model, by the name to show.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import numpy as np
    from matplotlib.figure import Figure

    plot = Figure(figsize=(10, 3.4), layout="constrained")
    panels = plot.subplots(1, 3)
    for axes, (key, title) in zip(panels, QUANTITIES.items(), strict=True):
        shown_values = [report[key]["mean"] for report in neurons.values()]
        edges = np.histogram_bin_edges(np.concatenate(shown_values), bins=24)
        for name, values in zip(neurons, shown_values, strict=True):
            axes.hist(values, edges, alpha=0.6, label=name)
        axes.set(title=title, xlabel="nats", ylabel="neurons" if axes is panels[0] else "")
    panels[0].legend()
    return plot


def _check(critic: CriticConfig) -> None:
    if critic.bound != "dv":
        raise ValueError(f"{OWNER}: critic.bound is {critic.bound!r}, wanted 'dv'")
    if critic.negatives is not None:
        raise ValueError(f"{OWNER}: critic.negatives is {critic.negatives}, wanted None, all pairs")


def _chosen(neurons: Sequence[int] | None, count: int) -> Tensor:
    """Return the neurons' numbers, all different, as a tensor (M,)."""
    given = list(range(count) if neurons is None else neurons)
    wrong = [
        k for k in given if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < count
    ]
    if wrong or not given or len(set(given)) < len(given):
        raise ValueError(
            f"{OWNER}: neurons is {neurons!r}, wanted different numbers from 0 to {count - 1}, or "
            "None for all"
        )
    return torch.tensor(given)


def _functions(setting: Setting, layer: str) -> PatchNeurons:
    """Return the layer's functions of patches, and make sure that the model computes them."""
    shape = tuple(setting.x_test.shape[1:])
    if len(shape) != 3:
        raise ValueError(f"{OWNER}: data has rows of shape {shape}, wanted images (C, H, W)")
    try:
        functions = PatchNeurons(setting.job.model, layer, shape).to(setting.job.device)
    except ValueError as error:
        raise ValueError(f"{OWNER}: {error}") from error
    images = setting.x_test[:2]
    with torch.no_grad():
        wanted, found = setting.encoder(images), functions.maps(images).flatten(1)
    if wanted.shape != found.shape or not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{OWNER}: layer {layer!r} is no function of patches of the images: the model does not "
            "give its images, as they are, to the layer's nn.Sequential"
        )
    return functions
