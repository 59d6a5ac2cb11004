"""What a report says: as text, as JSON, as a page and as a figure."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from html import unescape
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from matplotlib.image import imread
from measuring import SMALL, labelled, measured
from torch import nn

from wcmi_fast import Report, estimate_information, worst_case_information
from wcmi_fast.information import CAVEAT, Estimate, Evidence, Flag
from wcmi_fast.information.report import NO_FLAGS, duration

EVIDENCE = Evidence(
    train_value=1.5,
    test_value=1.25,
    curve=(0.5, 1.5),
    trace=(),
    zero_gradients=0.0,
    nonfinite_gradients=0.0,
    score_spread=2.0,
    best_batch=7,
)


def report(**changes: Any) -> Report:
    """Return a report of round numbers."""
    normal = Estimate.of([[1.0, 1.5, 1.25], [1.25, 1.75, 1.5]])
    worst = Estimate.of([[0.5, 0.25, 0.5], [0.25, 0.5, 0.75]])
    longer = replace(EVIDENCE, curve=(0.5, 1.5, 1.75))
    attacked = replace(EVIDENCE, trace=(1.0, 0.625, 0.4375))
    again = replace(longer, trace=(1.0, 0.625, 0.3125))
    found = Report(
        information=normal,
        worst_case=worst,
        vulnerability=normal.minus(worst),
        classes=10,
        accuracy_bound=0.5,
        accuracy_bound_interval=(0.25, 1.0),
        natural_accuracy=0.875,
        adversarial_accuracy=0.4375,
        flags=(Flag("one_trial", "There was <1> trial & more."),),
        evidence={"information": (EVIDENCE, longer), "worst_case": (attacked, again)},
        settings={
            "model": "Baseline<H>",
            "layer": "3.1",
            "data": "fashion_mnist",
            "clip": "[/0, 1]",
            "attack": "PGD",
            "eps": 0.1,
            "steps": 10,
            "step_size": 0.025,
            "batch_size": 100,
            "critic_grad": "encoder_only",
            "seed": 17,
        },
        seconds=83.2,
    )
    return replace(found, **changes)


def words(shown: str) -> str:
    """Return text without line ends and frames."""
    return re.sub(r"[\s│┃]+", " ", shown)


HEADINGS = "nats standard error 95 % interval bits 95 % interval"


def rows_of(found: Report) -> list[str]:
    """Return the rows that a table of the estimates must have below its headings."""
    names = {"information": "I", "worst_case": "worst-case I", "vulnerability": "RV"}
    wanted = []
    for name, estimate in found.estimates().items():
        ends, (low, high) = estimate.interval, (end / math.log(2) for end in estimate.interval)
        nats = f"{estimate.mean:.3f} {estimate.standard_error:.3f} {ends[0]:.3f} to {ends[1]:.3f}"
        bits = f"{estimate.mean / math.log(2):.3f} {low:.3f} to {high:.3f}"
        wanted.append(f"{names[name]} {nats} {bits}")
    return wanted


def words_of_page(page: str) -> str:
    """Return what a browser shows of a page."""
    return words(unescape(re.sub(r"<[^>]+>", " ", page)))


def test_the_text_has_every_number_the_flags_and_the_caveat() -> None:
    found = report()
    text = words(str(found))
    for row in (HEADINGS, *rows_of(found)):
        assert row in text
    assert "Baseline<H>, layer 3.1 on fashion_mnist" in text
    assert "bound on adversarial accuracy, 10 classes (theorem 3.4) 50.0 (25.0 to 100.0) %" in text
    assert "measured adversarial accuracy 43.8 %" in text
    assert "measured natural accuracy 87.5 %" in text
    assert "one_trial: There was <1> trial & more. See docs/measuring.md#one-trial." in text
    assert words(CAVEAT) in text
    assert "Settings; 1 min 23 s" in text
    for name, value in found.settings.items():
        assert f"{name} {value}" in text


def test_the_text_says_how_errors_and_the_attack_are_made() -> None:
    text = words(str(report()))
    assert "Mean over 2 critics trained anew (trials) and 3 test batches of 100 images" in text
    assert "Student's of the trials and a bootstrap of the batches (BCa), added in quad" in text
    assert "that of RV is of differences batch by batch (paired)" in text
    assert "Attack: PGD, eps 0.1, 10 steps of 0.025; critic_grad encoder_only, as in the au" in text
    full = report(settings={**report().settings, "critic_grad": "full"})
    assert "critic_grad full, as algorithm 1 is printed" in words(str(full))
    alone = Estimate.of([[1.0, 1.5, 1.25]])
    single = report(information=alone, worst_case=None, vulnerability=None)
    text = words(str(single))
    assert "Mean over 3 test batches of 100 images, with 1 critic; standard error of the b" in text
    assert "paired" not in text
    assert "Attack" not in text


def test_without_flags_and_labels() -> None:
    text = words(str(report(flags=(), accuracy_bound=None, classes=None)))
    assert NO_FLAGS in text
    assert "theorem 3.4" not in text


def test_what_is_unknown_is_called_so() -> None:
    text = words(str(report(information=Estimate.of([[1.0]]), vulnerability=None)))
    assert "I 1.000 unknown unknown to unknown 1.443" in text


def test_what_rounds_to_zero_has_no_sign() -> None:
    text = words(str(report(information=Estimate.of([[-1e-5, -2e-5]]), vulnerability=None)))
    assert "I 0.000 0.000 0.000 to 0.000 0.000 0.000 to 0.000" in text


def test_a_report_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        report().classes = 3  # type: ignore[misc]


def test_the_dictionary_is_strict_json() -> None:
    found = report(
        information=Estimate.of([[1.0]]),
        evidence={"information": (replace(EVIDENCE, score_spread=math.inf),)},
    )
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["information"]["interval"] == [None, None]
    assert plain["evidence"]["information"][0]["score_spread"] is None
    assert plain["information"]["trials"] == [1.0]
    assert plain["worst_case"]["mean"] == found.worst_case.mean  # type: ignore[union-attr]
    assert plain["vulnerability"]["bits"] == pytest.approx(0.9167 / math.log(2), abs=1e-3)
    assert plain["flags"] == [
        {
            "name": "one_trial",
            "sentence": "There was <1> trial & more.",
            "docs": "docs/measuring.md#one-trial",
        }
    ]
    assert plain["accuracy_bound_interval"] == [0.25, 1.0]
    assert plain["caveat"] == CAVEAT
    assert plain["settings"]["seed"] == 17


def test_the_folder_holds_all_of_it(tmp_path: Path) -> None:
    found = report()
    found.save(tmp_path / "some" / "folder")
    folder = tmp_path / "some" / "folder"
    assert sorted(file.name for file in folder.iterdir()) == [
        "report.html",
        "report.json",
        "report.png",
    ]
    assert json.loads((folder / "report.json").read_text()) == found.to_dict()
    page = (folder / "report.html").read_text()
    text = words_of_page(page)
    for row in (HEADINGS, *rows_of(found)):
        assert row in text
    assert "Baseline<H>, layer 3.1 on fashion_mnist" in text
    assert "Baseline<H>" not in page  # escaped
    assert "one_trial There was <1> trial & more. docs/measuring.md#one-trial" in text
    assert CAVEAT in text
    assert "50.0 (25.0 to 100.0) %" in text
    assert "seed 17" in text
    assert "paired" in text
    assert "encoder_only, as in the authors' code" in text
    assert "The measurement took 1 min 23 s." in text
    (described,) = re.findall(r'alt="([^"]*)"', page)
    for name, estimate in zip(("I", "worst-case I", "RV"), found.estimates().values(), strict=True):
        low, high = estimate.interval
        assert f"{name} {estimate.mean:.3f} nats ({low:.3f} to {high:.3f})" in described
    assert "the attack leads from 1.000 to 0.438 nats" in described
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources == ["data:image/png;base64,iVBORw0K"]


def test_a_page_of_a_plain_estimate(tmp_path: Path) -> None:
    plain = report(
        worst_case=None,
        vulnerability=None,
        accuracy_bound=None,
        flags=(),
        evidence={"information": (EVIDENCE,)},
    )
    plain.save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert NO_FLAGS in page
    assert "theorem 3.4" not in page
    assert "worst-case I" not in page


def test_the_figure_shows_estimates_paths_and_curves() -> None:
    found = report()
    estimates, path, curves = found.plot().axes
    assert [label.get_text() for label in estimates.get_yticklabels()] == [
        "RV",
        "worst-case I",
        "I",
    ]
    points = {
        round(float(line.get_ydata()[0])): float(line.get_xdata()[0])
        for line in (container[0] for container in estimates.containers)
    }
    wanted = [found.estimates()[name].mean for name in ("vulnerability", "worst_case")]
    assert [points[0], points[1]] == pytest.approx(wanted)
    reach = [container[2][0].get_segments()[0][:, 0] for container in estimates.containers]
    assert list(reach[0]) == pytest.approx(found.vulnerability.interval)  # type: ignore[union-attr]
    ticks = [(line.get_xdata()[0], round(line.get_ydata()[0])) for line in estimates.lines]
    trials = [[*map(fmean, each.batches)] for each in reversed(found.estimates().values())]
    for place, means in enumerate(trials):
        assert {(mean, place) for mean in means} <= set(ticks)
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in path.lines] == [
        ([0, 1, 2], [1.0, 0.625, 0.4375]),
        ([0, 1, 2], [1.0, 0.625, 0.3125]),
    ]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in curves.lines] == [
        ([1, 2], [0.5, 1.5]),
        ([1, 2, 3], [0.5, 1.5, 1.75]),
    ] * 2
    assert curves.get_xlim()[1] > 3
    handles, labels = curves.get_legend_handles_labels()
    assert labels == ["I", "worst-case I"]
    assert len({line.get_color() for line in handles}) == 2
    assert {axes.get_xlabel() for axes in (estimates, path, curves)} == {
        "nats",
        "attack step",
        "epoch",
    }


def test_the_figure_of_a_plain_estimate_has_no_path() -> None:
    plain = report(worst_case=None, vulnerability=None, evidence={"information": (EVIDENCE,)})
    assert len(plain.plot().axes) == 2


def test_one_epoch_has_one_tick() -> None:
    short = replace(EVIDENCE, curve=(0.5,))
    axes = report(evidence={"information": (short,)}).plot().axes[-1]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_the_picture_is_that_of_the_figure(tmp_path: Path) -> None:
    report().save(tmp_path)
    pixels = imread(tmp_path / "report.png")
    assert pixels.shape[1] > 1200
    assert pixels[..., :3].std() > 0.05


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the report's folder .*file/folder cannot be made"):
        report().save(tmp_path / "file" / "folder")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    sentence = f"the package {package}, .* is not installed: pip install 'wcmi_fast\\[demo\\]'"
    with pytest.raises(ModuleNotFoundError, match=sentence):
        report().save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert CAVEAT in words(str(report()))


def test_a_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report().save(tmp_path)
    names = ["report.json", "report.html", "report.png"]
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for written, name in enumerate(names):
        left = iter(range(written))

        def full(descriptor: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("wcmi_fast.files.os.fsync", full)
        with pytest.raises(OSError, match=f"could not write .*{name}; nothing was changed"):
            report(seconds=1.0).save(tmp_path)
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
        for kept in names[written:]:
            assert (tmp_path / kept).read_bytes() == before[kept]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (59.0, "59.0 s"), (60.0, "1 min 0 s"), (83.6, "1 min 24 s")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_reports_of_measurements_say_what_they_are(tmp_path: Path) -> None:
    x, y = labelled(80)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    options: dict[str, Any] = {"trials": 1, "critic": SMALL}
    reports = {
        "whole": measured(model, (x, y), head=nn.Identity()),
        "worst": worst_case_information(model, (x, y), eps=0.1, steps=1, **options),
        "plain": estimate_information(model, (x, y), **options),
    }
    for name, found in reports.items():
        found.save(tmp_path / name)
        text = words(str(found))
        page = words_of_page((tmp_path / name / "report.html").read_text())
        for row in rows_of(found):
            assert row in text
            assert row in page
        assert words(CAVEAT) in text
        assert len(found.flags) > 1
        for flag in found.flags:
            assert words(flag.sentence) in text
            assert flag.docs in page
    assert "theorem 3.4" in str(reports["worst"])
    assert "theorem 3.4" not in str(reports["plain"])
    assert "measured natural accuracy" in str(reports["whole"])
