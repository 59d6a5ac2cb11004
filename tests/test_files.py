from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wcmi_fast import files

# Runs as any user: root may write to a read-only folder, but not beyond a limit on file sizes.
LIMITED = """
import resource, signal, sys
from pathlib import Path
from wcmi_fast import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    {call}
except OSError as error:
    print(error)
"""


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def limited(call: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(call=call)],
        cwd=cwd, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_write_file_replaces_whole(tmp_path: Path) -> None:
    files.write_file(tmp_path / "a", "old")
    files.write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert left_over(tmp_path) == ["a"]


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    said = limited("files.write_file(Path('a'), b'x' * 5000)", tmp_path)
    assert "could not write a; nothing was changed" in said
    assert (tmp_path / "a").read_text() == "old"
    assert left_over(tmp_path) == ["a"]


def test_a_folder_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    files.write_folder(tmp_path / "c", {"one": b"1", "two": b"2"})
    said = limited("files.write_folder(Path('c'), {'one': b'3', 'two': b'x' * 5000})", tmp_path)
    assert "could not write c; nothing was changed" in said
    assert (tmp_path / "c" / "one").read_bytes() == b"1"
    assert left_over(tmp_path) == ["c"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: could not write .*/a;"):
        files.write_file(tmp_path / "a", "new")
    assert left_over(tmp_path) == []


def test_write_folder_replaces_whole(tmp_path: Path) -> None:
    files.write_folder(tmp_path / "c", {"old": b"1"})
    files.write_folder(tmp_path / "c", {"new": b"2"})
    assert left_over(tmp_path) == ["c"]
    assert left_over(tmp_path / "c") == ["new"]
