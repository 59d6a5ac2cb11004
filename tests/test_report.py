import base64
import io
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
import torch

from wcmi_fast.experiments.report import (
    Pictures,
    accuracy_table,
    information_table,
    write_report,
)
from wcmi_fast.information import CAVEAT, Estimate
from wcmi_fast.theory import adversarial_accuracy_upper_bound

VOID = {"meta", "img", "br", "hr", "link", "input"}
# In SVG, and nowhere else, a tag may close itself.
SELF_CLOSING = {"line", "polyline", "circle"}
HOSTILE = '<script>alert(\'1\')</script>&[bold]"x" onerror="y'


class Page(HTMLParser):
    """Fails on tags that are not balanced; collects attributes and text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SELF_CLOSING
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.words.append(" ")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def vulnerability(normal, worst, critic_grad="full"):
    normal, worst = Estimate.of([normal]), Estimate.of([worst])
    return {
        "information": asdict(normal),
        "worst_case": asdict(worst),
        "vulnerability": asdict(normal.minus(worst)),
        "accuracy_bound": adversarial_accuracy_upper_bound(worst.mean, 10),
        "critic_grad": critic_grad,
    }


def make_results():
    rows = [
        ("standard", "standard", 0.9331, 0.0),
        ("standard", "robust", 0.4127, 0.2033),
        ("worst-case", "standard", 0.9256, 0.1479),
        ("worst-case", "robust", 0.8743, 0.4512),
    ]
    names = ("representation", "head", "natural", "adversarial")
    return {
        "settings": {
            "data": "mnist5k",
            "seed": 17,
            "eps": 0.2,
            "step_size": 0.0667,
            "steps": 10,
            "budget_minutes": 6.25,
            "critic_grad": "full",
            "threads": 2,
            "bound": "dv",
            "test_images": 973,
            "estimate_batch_size": 97,
        },
        "accuracy": [dict(zip(names, row, strict=True)) for row in rows],
        "information": {
            "standard": vulnerability([1.31, 1.37, 1.42], [0.11, 0.14, 0.19]),
            "worst-case": vulnerability([1.51, 1.52, 1.58], [0.81, 0.88, 0.95]),
        },
        "seconds": 271.3,
        "command": "wcmi-fast quickstart --seed 17",
    }


def make_metrics():
    encoders = [
        {"stage": f"encoder-{name}", "epoch": epoch, "bound_nats": top * (1 - 0.5**epoch) - 0.1}
        for name, top in (("standard", 1.6234), ("worst-case", 1.0456))
        for epoch in range(1, 9)
    ]
    heads = [
        {"stage": f"head-{name}-{head}", "epoch": epoch, "loss_nats": 2.2 * rate**epoch}
        for name, head, rate in (
            ("standard", "standard", 0.5),
            ("standard", "robust", 0.95),
            ("worst-case", "standard", 0.6),
            ("worst-case", "robust", 0.8),
        )
        for epoch in range(1, 5)
    ]
    return encoders + heads


def make_pictures(channels=1, size=28):
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.rand(10, channels, size, size, generator=generator)

    originals = (noise() > 0.7).float()
    names = ("standard", "worst-case")
    return Pictures(
        labels=list(range(10)),
        originals=originals,
        attacked={n: (originals + 0.4 * (noise() - 0.5)).clamp(0, 1) for n in names},
        predictions={"standard": [3] * 10, "worst-case": [0, 1, 2, 3, 4, 5, 6, 7, 7, 8]},
        saliency={n: noise() - 0.5 for n in names},
    )


def report(tmp_path, results=None, metrics=None, pictures=None):
    path = write_report(
        tmp_path / "report.html",
        make_results() if results is None else results,
        make_metrics() if metrics is None else metrics,
        make_pictures() if pictures is None else pictures,
    )
    source = path.read_text("utf-8")
    return source, Page(source)


def pixels(image):
    from matplotlib.image import imread

    data = base64.b64decode(image["src"].partition(",")[2])
    return torch.from_numpy(imread(io.BytesIO(data), format="png"))[..., :3].movedim(-1, 0)


def rendered(table):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return " ".join(console.file.getvalue().split())


def test_result_in_words(tmp_path):
    _, page = report(tmp_path)
    assert (
        "Under attack at eps = 0.2, the robust head on the worst-case representation classifies"
        " 45.1 % of the test images correctly, on the standard representation 20.3 %: a difference"
        " of 24.8 points." in page.text
    )
    for fact in ("command wcmi-fast quickstart --seed 17", "seed 17", "time 4 min 31 s"):
        assert fact in page.text


def test_accuracies_with_their_errors(tmp_path):
    source, page = report(tmp_path)
    terminal = rendered(accuracy_table(make_results()))
    for share in (0.9331, 0.4127, 0.2033, 0.9256, 0.1479, 0.8743, 0.4512, 0.0):
        error = 100 * math.sqrt(share * (1 - share) / 973)
        shown = f"{100 * share:.1f} ± {error:.1f}"
        assert shown in page.text
        assert shown in terminal
        assert f'style="width:{100 * share:.2f}%"' in source
    caption = "Of 973 test images; ± one binomial standard error. Adversarial: PGD, eps = 0.2, 10"
    assert caption in page.text
    assert caption in terminal
    assert "steps of 0.0667." in page.text
    # Each representation is named once, beside both of its heads.
    assert re.findall("standard|worst-case|robust", terminal.split("Of 973")[0]) == [
        *("standard", "standard", "robust"),
        *("worst-case", "standard", "robust"),
    ]


def test_information_with_bounds(tmp_path):
    source, page = report(tmp_path)
    terminal = rendered(information_table(make_results()))
    # By hand: means and standard errors of three batches, and (I_worst + log 2) / log 10.
    rows = {
        "standard": ("1.367 ± 0.032", "0.147 ± 0.023", "1.220 ± 0.010", "36.5", "20.3"),
        "worst-case": ("1.537 ± 0.022", "0.880 ± 0.040", "0.657 ± 0.022", "68.3", "45.1"),
    }
    for name, numbers in rows.items():
        assert " ".join((name, *numbers)) in page.text
        assert " │ ".join((name, *numbers)) in re.sub(" +", " ", terminal)
    notes = (
        "Mean ± standard error over 3 test batches of N = 97 images, in nats.",
        "critic_grad: full, as algorithm 1 is printed.",
        "by theorem 3.4 from the worst-case I",
    )
    for note in notes:
        assert note in page.text
        assert note in terminal
    assert 'style="left:68.32%"' in source
    for absent in ("never negative", "single batch", "above its bound", "weaker attack"):
        assert absent not in page.text


def test_the_attack_of_the_authors_code_is_named(tmp_path):
    results = make_results()
    for found in results["information"].values():
        found["critic_grad"] = "encoder_only"
    _, page = report(tmp_path, results)
    assert "critic_grad: encoder_only, as in the authors' code, a weaker attack." in page.text


def test_negative_estimate_is_explained(tmp_path):
    results = make_results()
    results["information"]["standard"] = vulnerability([1.3, 1.4, 1.2], [-0.2, -0.31, -0.3])
    sentence = (
        "The estimate of the standard representation's worst-case I is negative; information is"
        " never negative, so that the bound is taken at 0."
    )
    _, page = report(tmp_path, results)
    assert sentence in page.text
    assert sentence in rendered(information_table(results))
    assert "\N{MINUS SIGN}0.270 ± 0.035" in page.text
    assert " 30.1 20.3 " in page.text


def test_accuracy_above_its_bound_is_explained(tmp_path):
    results = make_results()
    results["accuracy"][3]["adversarial"] = 0.8
    _, page = report(tmp_path, results)
    assert "The worst-case representation's measured accuracy is above its bound" in page.text
    assert "The standard representation's measured accuracy" not in page.text


def test_one_batch_has_no_standard_error(tmp_path):
    results = make_results()
    results["information"] = {
        name: vulnerability([1.25], [0.75]) for name in results["information"]
    }
    _, page = report(tmp_path, results)
    assert "over 1 test batch of N = 97 images" in page.text
    assert "A single batch has no standard error." in page.text
    assert "standard 1.250 0.750 0.500 62.7" in page.text
    assert "nan" not in page.text


def test_caveats(tmp_path):
    _, page = report(tmp_path)
    assert CAVEAT in page.text
    for caveat in (
        "One run with one seed (17)",
        # The largest is that of 45.12 %: sqrt(.4512 * .5488 / 973) = 1.595 %.
        "The test set has 973 images: the binomial standard error √(p(1-p)/973) of the"
        " accuracies here is at most 1.6 points.",
        "At 0 % and 100 % the formula gives 0; with 95 % confidence the true value is then"
        " within 0.3 points.",
        "PGD without restarts",
        "adversarial accuracies are upper bounds",
    ):
        assert caveat in page.text
    results = make_results()
    results["accuracy"][0]["adversarial"] = 0.01
    assert "the formula gives 0" not in report(tmp_path, results)[1].text


def test_curves_pass_through_the_metrics(tmp_path):
    _, page = report(tmp_path)
    encoders, heads = (attrs for attrs in page.all("svg") if attrs.get("role") == "img")
    assert "information (dv), nats" in encoders["aria-label"]
    assert "standard: 0.712 to 1.517 after 8 epochs" in encoders["aria-label"]
    assert "worst-case: 0.423 to 0.942 after 8 epochs" in encoders["aria-label"]
    assert "worst-case, robust head: 1.760 to 0.901 after 4 epochs" in heads["aria-label"]
    lines = [attrs["points"].split() for attrs in page.all("polyline")]
    curves = [line for line in lines if len(line) > 2]
    assert [len(line) for line in curves] == [8, 8, 4, 4, 4, 4]
    for line in curves:
        points = [tuple(map(float, point.split(","))) for point in line]
        assert points[0][0] == 44
        assert points[-1][0] == 444
        assert all(12 <= y <= 212 for _, y in points)
    # The standard encoder's axis ends at 1.6, and a higher value stands higher (smaller y).
    ys = [float(point.split(",")[1]) for point in curves[0]]
    assert ys == sorted(ys, reverse=True)
    assert ys[-1] == pytest.approx(212 - 200 * 1.5171 / 1.6, abs=0.1)


@pytest.mark.parametrize("epochs", [0, 1])
def test_few_epochs(tmp_path, epochs):
    metrics = [record for record in make_metrics() if record["epoch"] <= epochs]
    _, page = report(tmp_path, metrics=metrics)
    assert page.text.count("No epochs were recorded.") == (0 if epochs else 2)
    assert len(page.all("circle")) == 6 * epochs


def test_values_that_are_not_finite_are_left_out_of_curves(tmp_path):
    metrics = make_metrics()
    metrics[0]["bound_nats"] = math.nan
    metrics[-1]["loss_nats"] = math.inf
    source, page = report(tmp_path, metrics=metrics)
    assert len(page.all("circle")) == 2 * 8 + 4 * 4 - 2
    assert not re.search(r"\b(nan|inf)\b", source)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_pictures_are_embedded(tmp_path, channels, size):
    pictures = make_pictures(channels, size)
    source, page = report(tmp_path, pictures=pictures)
    assert len(source.encode()) < 1_500_000
    assert not re.search(r"https?:|url\(|@import|<script|<link", source)
    images = page.all("img")
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert all(image["alt"] for image in images)
    scales = sum("colour scale" in image["alt"] for image in images)
    assert len(images) == 10 * (1 + 2 * 2) + 10 * (1 + 2) + scales
    assert scales == (2 if channels == 1 else 1)
    by_name = {image["alt"]: image for image in images}
    attacked = pictures.attacked["worst-case"]
    expected = attacked[4].expand(3, -1, -1)
    # Eight bits a channel.
    shown = pixels(by_name["attacked through worst-case, class 4"])
    torch.testing.assert_close(shown, expected, rtol=0, atol=1 / 255)
    change = pixels(by_name["change by the attack on worst-case, class 4"])
    grew = (attacked - pictures.originals)[4]
    if channels == 1:
        # Blue to red: the sign of the change is that of red minus blue.
        apart = grew[0].abs() > 0.02
        assert torch.equal((change[0] > change[2])[apart], (grew[0] > 0)[apart])
    else:
        assert torch.equal((change > 0.51)[grew.abs() > 0.02], (grew > 0)[grew.abs() > 0.02])
    saliency = pictures.saliency["standard"][6].mean(0)
    peak = pixels(by_name["saliency of standard, class 6"]).flatten(1)[:, saliency.abs().argmax()]
    ends = [(103, 0, 31), (5, 48, 97)]  # of RdBu
    assert [tuple((peak * 255).round().int().tolist())] == [
        ends[int(saliency.min() == -saliency.abs().max())]
    ]


def test_scale_of_differences_is_stated(tmp_path):
    pictures = make_pictures()
    largest = max(
        (images - pictures.originals).abs().max().item() for images in pictures.attacked.values()
    )
    _, page = report(tmp_path, pictures=pictures)
    assert f"\N{MINUS SIGN}{largest:.3g}" in page.text
    assert f"+{largest:.3g}" in page.text
    assert "divided by its own largest absolute value" in page.text


def test_predictions_are_marked(tmp_path):
    source, page = report(tmp_path)
    # "3" is right once for the standard representation; the worst-case one misses 8 and 9.
    assert source.count('<span class="right">') == 1 + 8
    assert source.count('<span class="wrong">') == 9 + 2
    assert "3 ✓right" in page.text
    assert "7 ✗wrong 8 ✗wrong" in page.text


def test_images_without_change_or_gradient(tmp_path):
    pictures = make_pictures()
    still = pictures._replace(
        attacked=dict.fromkeys(pictures.attacked, pictures.originals),
        saliency=dict.fromkeys(pictures.saliency, torch.zeros_like(pictures.originals)),
    )
    _, page = report(tmp_path, pictures=still)
    white = [image for image in page.all("img") if re.match("saliency|change", image["alt"])]
    assert len(white) == 40
    for image in white:
        assert pixels(image).min() > 0.95


def test_every_setting_is_listed(tmp_path):
    results = make_results()
    results["settings"]["warm_up_of_eps"] = 0.4321
    _, page = report(tmp_path, results)
    for name, value in results["settings"].items():
        assert f"{name} {value}" in page.text


def test_markup_of_the_page(tmp_path):
    source, page = report(tmp_path)
    assert source.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert all("scope" in attrs for attrs in page.all("th"))
    assert "prefers-color-scheme: dark" in source
    assert "image-rendering: pixelated" in source
    headings = re.findall("<h2.*?>(.*?)</h2>", source)
    assert headings == [
        *("Accuracy", "Information", "What these numbers are not", "Training"),
        *("Images under attack", "Saliency", "Settings"),
    ]


def test_hostile_strings_are_escaped(tmp_path):
    results = make_results()
    results["command"] = results["settings"]["data"] = results["settings"]["bound"] = HOSTILE
    results["settings"][HOSTILE] = 1
    results["information"][HOSTILE] = results["information"]["standard"]
    results["accuracy"].append(results["accuracy"][0] | {"representation": HOSTILE})
    pictures = make_pictures()
    for images in (pictures.attacked, pictures.predictions, pictures.saliency):
        images[HOSTILE] = images["standard"]
    _, page = report(tmp_path, results, pictures=pictures)
    assert not page.all("script")
    assert not [attrs for _, attrs in page.tags if "onerror" in attrs]
    assert f"command {HOSTILE}" in page.text
    for table in (accuracy_table(results), information_table(results)):
        assert "[bold]" in rendered(table)


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*pip install 'wcmi_fast\[demo\]'"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_module_does_not_import_what_only_reports_need():
    code = (
        "import sys; import wcmi_fast.experiments.report;"
        "print({'matplotlib', 'jinja2', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "set()"


def test_only_the_report_is_left(tmp_path):
    report(tmp_path)
    first = (tmp_path / "report.html").read_text("utf-8")
    report(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text("utf-8") == first


def test_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    report(tmp_path)
    first = (tmp_path / "report.html").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    results = make_results()
    results["command"] = "another"
    with pytest.raises(OSError, match=r"No space left on device.*report\.html"):
        report(tmp_path, results)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == first


@pytest.mark.parametrize("make", [accuracy_table, information_table, None])
def test_missing_setting_is_named(tmp_path, make):
    results = make_results()
    del results["settings"]["estimate_batch_size"]
    with pytest.raises(ValueError, match="estimate_batch_size"):
        make(results) if make else report(tmp_path, results)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"originals": torch.zeros(10, 28, 28)}, r"originals has shape \(10, 28, 28\)"),
        ({"originals": torch.zeros(10, 2, 28, 28)}, r"originals has shape \(10, 2, 28, 28\)"),
        ({"labels": [1, 2]}, "2 classes for 'labels', and 10 images"),
        ({"predictions": {"standard": [1]}}, "1 classes for 'standard', and 10 images"),
        (
            {"saliency": {"standard": torch.zeros(10, 1, 14, 14)}},
            r"saliency\['standard'\] has shape \(10, 1, 14, 14\).*\(10, 1, 28, 28\)",
        ),
    ],
)
def test_pictures_that_disagree(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        report(tmp_path, pictures=make_pictures()._replace(**change))
    assert list(tmp_path.iterdir()) == []
