"""The paper's table in small: what is trained on what, the table, and going on."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from two_kinds import write_two_kinds

from wcmi_fast.experiments import representations
from wcmi_fast.experiments.published import PUBLISHED
from wcmi_fast.experiments.representations import ROWS, Job, tables
from wcmi_fast.experiments.reproduction import as_text, reproduce
from wcmi_fast.training import presets, tasks
from wcmi_fast.training.options import Task

SIZES = {"epochs": 1, "batch_size": 10, "steps": 1, "test_steps": 1}


class Run(NamedTuple):
    job: Job
    folder: Path
    found: dict[str, Any]
    said: list[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("representations")
    data = write_two_kinds(folder / "digits.npz", train=40, test=12)
    options = {"data": str(data), **SIZES}
    tiny = {"encoder": {**options, "units": 8}, "head": options, "classifier": options}
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", tiny)
        job = Job(preset="tiny", held_out=10, test_images=12)
        found = dict(reproduce(representations, job, folder / "run", said.append))
        yield Run(job, folder / "run", found, said)


def task_of(folder: Path) -> dict[str, Any]:
    ((kind, options), _) = tomllib.loads((folder / "config.toml").read_text()).items()
    return {"task": kind, **options}


def test_every_row_is_what_its_name_says(ran: Run) -> None:
    run = ran.folder
    assert [task_of(run / f"0-encoder-{name}")["beta"] for name in ("standard", "worst_case")] == [
        0.0,
        1.0,
    ]
    for representation, head in ROWS:
        supervised = representation == "supervised"
        for kind in ("mlp",) if supervised else ("mlp", "linear"):
            task = task_of(run / f"0-{representation}-{head}-{kind}")
            assert task["task"] == ("classifier" if supervised else "head")
            assert task["robust"] == (head == "robust")
            assert task["early_stop"] == (head == "early_stop")
            assert task["held_out"] == (10 if head == "early_stop" else 0)
            if supervised:
                assert task["network"] == f"baseline_h_{kind}"
            else:
                assert task["kind"] == kind
                assert task["encoder"] == str(run / f"0-encoder-{representation}")
    assert len(ran.found["seconds"]) == 14


def test_the_table_has_the_runs_accuracies(ran: Run) -> None:
    for row in ran.found["rows"]:
        for kind in ("mlp", "linear"):
            if row["representation"] == "supervised" and kind == "linear":
                assert row[kind] == {"natural": [], "adversarial": []}
                continue
            folder = ran.folder / f"0-{row['representation']}-{row['head']}-{kind}"
            results = json.loads((folder / "results.json").read_text())
            for name in ("natural", "adversarial"):
                assert row[kind][name] == [results[f"{name}_accuracy"]]
    rows = [
        {**row, "mlp": {"natural": [0.5, 0.75], "adversarial": [0.25, 0.0]}}
        for row in ran.found["rows"]
    ]
    text = as_text(tables({**ran.found, "rows": rows, "data": "fashion_mnist"}))
    assert text.count("62.50 ± 17.68") == text.count("12.50 ± 17.68") == len(ROWS)
    assert "12 test images, which leave 24.6 points" in " ".join(text.split())
    for head in PUBLISHED["fashion_mnist"].values():
        assert all(f"({value:.2f})" in text for value in head["mlp"])


def test_it_goes_on(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (ran.folder / "stages" / "0-supervised-robust-mlp.json").unlink()
    trained: list[Path] = []
    real = tasks.train

    def train(task: Task, folder: Path, *given: Any) -> dict[str, Any]:
        trained.append(folder)
        return real(task, folder, *given)

    monkeypatch.setattr(tasks, "train", train)
    again = reproduce(representations, ran.job, ran.folder, lambda text: None)
    assert [folder.name for folder in trained] == ["0-supervised-robust-mlp"]
    assert again["rows"] == ran.found["rows"]


def test_it_says_what_it_does(ran: Run) -> None:
    assert "0-encoder-worst_case" in ran.said
    assert any("0-encoder-worst_case: batch 4  bound_nats" in text for text in ran.said)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="representations: preset is 'cpu', wanted one of"):
        Job(preset="cpu")
    for name in ("seeds", "kinds"):
        with pytest.raises(ValueError, match=f"representations: {name} is empty"):
            Job(preset="paper/mnist", **{name: ()})
