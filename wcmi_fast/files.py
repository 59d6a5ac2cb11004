"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file; on any failure the old content stays and no temporary file is left.

    Raises:
        OSError: the folder is not writable or the disk is full; the message names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        _write_synced(temporary, data)
        temporary.replace(path)
    except OSError as error:
        discard(temporary)
        raise _explained(error, path) from error


def write_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Write a new folder of files, all of them or nothing; an older folder of that name goes.

    Raises:
        OSError: the parent is not writable or the disk is full; the message names the folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    older = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        discard(temporary)
        temporary.mkdir(parents=True)
        for name, data in contents.items():
            _write_synced(temporary / name, data)
        if path.exists():
            path.replace(older)
        temporary.replace(path)
        discard(older)
    except OSError as error:
        discard(temporary)
        raise _explained(error, path) from error


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def discard(path: Path) -> None:
    """Remove a file or a folder with all it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _explained(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, f"{error.strerror}: could not write {path}; nothing was changed")
