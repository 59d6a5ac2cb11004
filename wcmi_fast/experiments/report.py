"""The report of a run: one self-contained HTML file, and the same tables for the terminal.

`results` is the content of results.json and `metrics` the lines of metrics.jsonl. The settings in
`results` name at least `eps`, `step_size`, `steps`, `seed`, `bound`, `test_images` (number of test
images) and `estimate_batch_size` (images per batch of the information estimates).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from wcmi_fast.files import write_file
from wcmi_fast.information import CAVEAT

if TYPE_CHECKING:
    from collections.abc import Callable

    from jinja2 import Template
    from rich.table import Table

Results = Mapping[str, Any]

ATTACKS = {
    "full": "full, as algorithm 1 is printed",
    "encoder_only": "encoder_only, as in the authors' code, a weaker attack",
}
SETTINGS = ("eps", "step_size", "steps", "seed", "bound", "test_images", "estimate_batch_size")


class Pictures(NamedTuple):
    """What the report shows of K test images; the keys are representations' names.

    Attributes:
        labels: the true classes.
        originals: (K, C, H, W), float32 in [0, 1], C = 1 or 3.
        attacked: the images perturbed through the representation's robust head.
        predictions: the robust head's classes of the attacked images.
        saliency: gradients of the information loss with respect to the images.
    """

    labels: list[int]
    originals: Tensor
    attacked: dict[str, Tensor]
    predictions: dict[str, list[int]]
    saliency: dict[str, Tensor]


def write_report(
    path: Path, results: Results, metrics: Sequence[Mapping[str, Any]], pictures: Pictures
) -> Path:
    """Write one HTML file that needs no other: tables, curves, images, caveats and settings.

    Args:
        path: the file to write; whole or not there.
        results: the content of results.json.
        metrics: the lines of metrics.jsonl.
        pictures: test images, attacked images and saliency maps.

    Returns:
        path.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is not installed.
        OSError: the file cannot be written.
        ValueError: a setting that the report quotes is missing; pictures that disagree in shape.
    """
    check_packages()
    _check_settings(results["settings"])
    _check_pictures(pictures)
    page = _template().render(
        results=results,
        summary=_summary(results),
        duration=_duration(results["seconds"]),
        accuracy=_accuracy_groups(results),
        accuracy_note=_accuracy_note(results["settings"]),
        information=_information_rows(results),
        information_notes=_information_notes(results),
        caveats=_caveats(results),
        charts=_charts(results, metrics),
        pictures=_picture_tables(results, pictures),
    )
    write_file(path, page)
    return path


def accuracy_table(results: Results) -> Table:
    """Return natural and adversarial accuracies, in the form of the paper's table 1.

    Args:
        results: the content of results.json.

    Raises:
        ValueError: a setting that the table quotes is missing.
    """
    from rich.table import Table
    from rich.text import Text

    settings = results["settings"]
    _check_settings(settings)
    caption = Text(_accuracy_note(settings))
    table = Table(title="Accuracy, %", caption=caption, caption_justify="left")
    for name in ("representation", "head"):
        table.add_column(name)
    for name in ("natural", "adversarial"):
        table.add_column(name, justify="right")
    for representation, rows in _accuracy_groups(results).items():
        for i, row in enumerate(rows):
            name = "" if i else representation
            numbers = [
                f"{_number(share.percent, 1)} ± {_number(share.error, 1)}"
                for share in (row.natural, row.adversarial)
            ]
            table.add_row(Text(name), Text(row.head), *numbers, end_section=i == len(rows) - 1)
    return table


def information_table(results: Results) -> Table:
    """Return the information numbers of each representation, with the bound of theorem 3.4.

    Args:
        results: the content of results.json.

    Raises:
        ValueError: a setting that the table quotes is missing.
    """
    from rich.table import Table
    from rich.text import Text

    _check_settings(results["settings"])
    caption = Text(" ".join(_information_notes(results)))
    title = "Information, nats, and adversarial accuracy, %"
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("representation")
    for name in ("I", "worst-case I", "RV", "bound, %", "measured, %"):
        table.add_column(name, justify="right")
    for row in _information_rows(results):
        numbers = (row.information, row.worst_case, row.vulnerability)
        shares = (_number(share, 1) for share in (row.bound, row.measured))
        table.add_row(Text(row.representation), *numbers, *shares)
    return table


class _Share(NamedTuple):
    """A fraction of the test images, with its binomial standard error, both in percent."""

    percent: float
    error: float


class _AccuracyRow(NamedTuple):
    head: str
    natural: _Share
    adversarial: _Share


class _InformationRow(NamedTuple):
    """Nats as text; the bound on and the measured adversarial accuracy in percent."""

    representation: str
    information: str
    worst_case: str
    vulnerability: str
    bound: float
    measured: float


def _summary(results: Results) -> str:
    eps = results["settings"]["eps"]
    robust = {
        row["representation"]: 100 * row["adversarial"]
        for row in results["accuracy"]
        if row["head"] == "robust"
    }
    worst, standard = robust["worst-case"], robust["standard"]
    return (
        f"Under attack at eps = {eps:g}, the robust head on the worst-case representation"
        f" classifies {_number(worst, 1)} % of the test images correctly, on the standard"
        f" representation {_number(standard, 1)} %: a difference of"
        f" {_number(worst - standard, 1)} points."
    )


def _accuracy_groups(results: Results) -> dict[str, list[_AccuracyRow]]:
    images = results["settings"]["test_images"]
    groups: dict[str, list[_AccuracyRow]] = {}
    for row in results["accuracy"]:
        shares = (_share(row[kind], images) for kind in ("natural", "adversarial"))
        groups.setdefault(row["representation"], []).append(_AccuracyRow(row["head"], *shares))
    return groups


def _information_rows(results: Results) -> list[_InformationRow]:
    groups = _accuracy_groups(results)
    return [
        _InformationRow(
            name,
            information=_estimate(found["information"]),
            worst_case=_estimate(found["worst_case"]),
            vulnerability=_estimate(found["vulnerability"]),
            bound=100 * found["accuracy_bound"],
            measured=max(row.adversarial.percent for row in groups[name]),
        )
        for name, found in results["information"].items()
    ]


def _accuracy_note(settings: Mapping[str, Any]) -> str:
    return (
        f"Of {settings['test_images']} test images; ± one binomial standard error. Adversarial:"
        f" PGD, eps = {settings['eps']:g}, {settings['steps']} steps of"
        f" {settings['step_size']:g}."
    )


def _information_notes(results: Results) -> list[str]:
    """Say how the estimates were made, and where they or the bound need an explanation."""
    found = results["information"]
    count = max(len(each["information"]["batches"][0]) for each in found.values())
    attacks = sorted({each["critic_grad"] for each in found.values()})
    notes = [
        f"Mean ± standard error over {count} test {'batch' if count == 1 else 'batches'} of"
        f" N = {results['settings']['estimate_batch_size']} images, in nats.",
        f"critic_grad: {'; '.join(ATTACKS.get(attack, attack) for attack in attacks)}.",
        "Bound: the most that any classifier on the representation could reach under attack, by"
        " theorem 3.4 from the worst-case I. Measured: the best adversarial accuracy of its heads.",
    ]
    if count == 1:
        notes.append("A single batch has no standard error.")
    notes += [_negative_note(name) for name in found if found[name]["worst_case"]["mean"] < 0]
    rows = _information_rows(results)
    notes += [_above_note(row) for row in rows if row.measured > row.bound]
    return notes


def _negative_note(representation: str) -> str:
    return (
        f"The estimate of the {representation} representation's worst-case I is negative;"
        " information is never negative, so that the bound is taken at 0."
    )


def _above_note(row: _InformationRow) -> str:
    return (
        f"The {row.representation} representation's measured accuracy is above its bound: the"
        " theorem holds for the true information, of which the critic then found too little, or"
        " the evaluation's attack was too weak."
    )


def _caveats(results: Results) -> list[str]:
    settings = results["settings"]
    images = settings["test_images"]
    shares = [row[kind] for row in results["accuracy"] for kind in ("natural", "adversarial")]
    errors = [_share(share, images).error for share in shares]
    sampling = (
        f"The test set has {images} images: the binomial standard error √(p(1-p)/{images}) of the"
        f" accuracies here is at most {_number(max(errors), 1)} points."
    )
    if any(share in (0, 1) for share in shares):
        sampling += (
            " At 0 % and 100 % the formula gives 0; with 95 % confidence the true value is then"
            f" within {_number(100 * min(1.0, 3 / images), 1)} points."
        )
    return [
        CAVEAT,
        f"One run with one seed ({settings['seed']}): no ± here contains the spread between seeds,"
        " and those of the information not that between trainings of a critic.",
        sampling,
        "The evaluation's attack is PGD without restarts. A stronger attack finds more errors:"
        " adversarial accuracies are upper bounds.",
    ]


class _Line(NamedTuple):
    name: str
    colour: int
    dashed: bool
    points: list[tuple[float, float]]


class _Chart(NamedTuple):
    """A line chart; positions are fractions of the plot's width and height, from below."""

    title: str
    summary: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[_Line]


def _charts(results: Results, metrics: Sequence[Mapping[str, Any]]) -> list[_Chart]:
    colours = {name: i for i, name in enumerate(results["information"])}
    encoders = [
        _Line(name, colour, False, _curve(metrics, f"encoder-{name}", "bound_nats"))
        for name, colour in colours.items()
    ]
    pairs = [(row["representation"], row["head"]) for row in results["accuracy"]]
    heads = [
        _Line(
            f"{name}, {head} head",
            colours[name],
            head == "standard",
            _curve(metrics, f"head-{name}-{head}", "loss_nats"),
        )
        for name, head in pairs
    ]
    bound = results["settings"]["bound"]
    return [
        _chart(f"Encoders: bound on information ({bound}), nats", encoders),
        _chart("Heads: training loss (cross-entropy), nats", heads),
    ]


def _curve(
    metrics: Sequence[Mapping[str, Any]], stage: str, value: str
) -> list[tuple[float, float]]:
    return [
        (record["epoch"], record[value])
        for record in metrics
        if record["stage"] == stage and math.isfinite(record[value])
    ]


def _chart(title: str, lines: list[_Line]) -> _Chart:
    from matplotlib.ticker import MaxNLocator

    lines = [line for line in lines if line.points]
    points = [point for line in lines for point in line.points] or [(1, 0.0)]
    last = max(x for x, _ in points)
    # One epoch alone stands in the middle rather than on the frame.
    x_low, x_high = (1, last) if last > 1 else (0.5, 1.5)
    x_ticks = [t for t in MaxNLocator(6, integer=True).tick_values(1, last) if x_low <= t <= x_high]
    values = [0.0, *(y for _, y in points)]
    y_ticks = MaxNLocator(5).tick_values(min(values), max(values))

    def x_at(x: float) -> float:
        return (x - x_low) / (x_high - x_low)

    def y_at(y: float) -> float:
        return float((y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    return _Chart(
        title,
        "; ".join(_journey(line) for line in lines) or "no epochs were recorded",
        _labelled(x_ticks, x_at),
        _labelled(y_ticks, y_at),
        [line._replace(points=[(x_at(x), y_at(y)) for x, y in line.points]) for line in lines],
    )


def _labelled(
    ticks: Iterable[float], position: Callable[[float], float]
) -> list[tuple[float, str]]:
    return [(position(tick), _minus(f"{tick:.6g}")) for tick in map(float, ticks)]


def _journey(line: _Line) -> str:
    (_, first), (epochs, last) = line.points[0], line.points[-1]
    return f"{line.name}: {_number(first, 3)} to {_number(last, 3)} after {epochs:g} epochs"


class _Cell(NamedTuple):
    """An image in a table of pictures, and what is said under it."""

    source: str
    alt: str
    prediction: int | None = None
    right: bool = False


class _PictureTables(NamedTuple):
    """Rows of cells by name; `largest` is the pixel change at the ends of the difference scale."""

    labels: list[int]
    colour: bool
    largest: float
    scale: str
    attacked: dict[str, list[_Cell]]
    saliency: dict[str, list[_Cell]]


def _picture_tables(results: Results, pictures: Pictures) -> _PictureTables:
    labels, originals = pictures.labels, pictures.originals
    changes = {name: images - originals for name, images in pictures.attacked.items()}
    largest = max(change.abs().max().item() for change in changes.values())
    first = {"original": _cells(originals, labels, "original image")}
    attacked, saliency = dict(first), dict(first)
    for name in results["information"]:
        attacked[f"{name}: attacked"] = _predicted(pictures, name)
        attacked[f"{name}: difference"] = _cells(
            _change_colours(changes[name], largest), labels, f"change by the attack on {name}"
        )
        saliency[name] = _cells(
            _saliency_colours(pictures.saliency[name]), labels, f"saliency of {name}"
        )
    scale = _png(_diverging(torch.linspace(-1, 1, 128).expand(1, 1, -1))[0])
    return _PictureTables(labels, originals.shape[1] == 3, largest, scale, attacked, saliency)


def _predicted(pictures: Pictures, name: str) -> list[_Cell]:
    cells = _cells(pictures.attacked[name], pictures.labels, f"attacked through {name}")
    return [
        cell._replace(prediction=prediction, right=prediction == label)
        for cell, prediction, label in zip(
            cells, pictures.predictions[name], pictures.labels, strict=True
        )
    ]


def _cells(images: Tensor, labels: Sequence[int], what: str) -> list[_Cell]:
    return [
        _Cell(_png(image), f"{what}, class {label}")
        for image, label in zip(images, labels, strict=True)
    ]


def _change_colours(change: Tensor, largest: float) -> Tensor:
    relative = change / (largest or 1.0)
    return _diverging(relative[:, 0]) if change.shape[1] == 1 else (relative + 1) / 2


def _saliency_colours(gradient: Tensor) -> Tensor:
    gradient = gradient.mean(1)
    peak = gradient.abs().amax((1, 2), keepdim=True)
    return _diverging(gradient / torch.where(peak > 0, peak, 1.0))


def _diverging(values: Tensor) -> Tensor:
    """Colour values (K, H, W) in [-1, 1]: blue, white at 0, red; as (K, 3, H, W) in [0, 1]."""
    import matplotlib as mpl

    colours = mpl.colormaps["RdBu_r"](((values.detach().cpu() + 1) / 2).numpy())
    return torch.from_numpy(colours[..., :3]).movedim(-1, 1)


def _png(image: Tensor) -> str:
    """Return an image (1 or 3, H, W) in [0, 1] as a data address."""
    from matplotlib.image import imsave

    # Three equal channels keep grey images out of matplotlib's colour maps.
    pixels = image.detach().cpu().expand(3, -1, -1).movedim(0, -1).clamp(0, 1).numpy()
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    source = files("wcmi_fast.experiments").joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(source)


def _share(fraction: float, images: int) -> _Share:
    return _Share(100 * fraction, 100 * math.sqrt(fraction * (1 - fraction) / images))


def _estimate(estimate: Mapping[str, Any]) -> str:
    mean, error = _number(estimate["mean"], 3), estimate["standard_error"]
    return mean if math.isnan(error) else f"{mean} ± {_number(error, 3)}"


def _number(value: float, digits: int) -> str:
    # Adding 0.0 turns -0.0 into 0.0.
    return _minus(f"{round(value, digits) + 0.0:.{digits}f}")


def _minus(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def check_packages() -> None:
    """Raise ModuleNotFoundError, with the remedy, unless the report's packages are installed."""
    for package in ("jinja2", "matplotlib"):
        try:
            import_module(package)
        except ImportError:
            raise ModuleNotFoundError(
                f"write_report: the package {package}, which the report is made with, is not"
                " installed: pip install 'wcmi_fast[demo]'"
            ) from None


def _check_settings(settings: Mapping[str, Any]) -> None:
    for name in SETTINGS:
        if name not in settings:
            raise ValueError(f"report: results['settings'] has no {name!r}, which is quoted")


def _check_pictures(pictures: Pictures) -> None:
    shape = tuple(pictures.originals.shape)
    if len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
        raise ValueError(
            f"write_report: pictures.originals has shape {shape}, wanted (K, 1 or 3, H, W)"
        )
    for field in ("attacked", "saliency"):
        for name, images in getattr(pictures, field).items():
            if tuple(images.shape) != shape:
                raise ValueError(
                    f"write_report: pictures.{field}[{name!r}] has shape {tuple(images.shape)},"
                    f" wanted that of originals, {shape}"
                )
    for field, classes in {"labels": pictures.labels, **pictures.predictions}.items():
        if len(classes) != shape[0]:
            raise ValueError(
                f"write_report: pictures has {len(classes)} classes for {field!r}, and"
                f" {shape[0]} images"
            )
