from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wcmi_fast
from wcmi_fast import cli, diagnosis
from wcmi_fast.backends import cpu, registry
from wcmi_fast.commands.quickstart import QuickstartCommand
from wcmi_fast.experiments import quickstart


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wcmi_fast", *args], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize("args", [(), ("info",)])
def test_info_tells_what_works(args: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert wcmi_fast.__version__ in done.stdout
    assert f"{cpu.simd_levels()[1]} of base" in done.stdout
    text = " ".join(done.stdout.split())
    assert f"ready: {', '.join(cpu.BACKEND.operators)}" in text
    assert "critic_stats on cuda" in text


def test_info_names_every_back_end() -> None:
    named = [what for what, _ in diagnosis.lines() if what.startswith("back end")]
    assert named == [f"back end {name}" for name in ("reference", "cpu", "cuda", "triton")]


def test_info_does_not_call_cuda_ready_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    present = registry.BACKENDS["cuda"]._replace(missing=None, operators=("linf_step_",))
    monkeypatch.setitem(registry.BACKENDS, "cuda", present)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = "installed (linf_step_), but torch sees no GPU"
    assert dict(diagnosis.lines())["back end cuda"] == wanted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dict(diagnosis.lines())["back end cuda"] == "ready: linf_step_"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--eps", "-0.1"], "quickstart: eps is -0.1, wanted a finite number >= 0"),
        (["--eps", "nan"], "quickstart: eps is nan, wanted a finite number >= 0"),
        (["--budget", "0"], "quickstart: budget is 0.0, wanted minutes > 0"),
        (["--resume", "nowhere"], "quickstart: resume is nowhere, wanted the folder of an earlier"),
    ],
)
def test_bad_options_get_one_sentence(
    args: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quickstart", "--out", str(tmp_path), *args])
    assert stopped.value.code == 1
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quickstart", "--out", str(tmp_path / "file")])
    assert stopped.value.code == 1
    assert "cannot be made" in " ".join(capsys.readouterr().err.split())


def test_the_defaults_of_the_command_are_those_of_the_job() -> None:
    command, job = QuickstartCommand(), quickstart.Quickstart()
    for field in ("seed", "eps", "budget", "device"):
        assert getattr(command, field) == getattr(job, field)
