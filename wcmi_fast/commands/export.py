"""`wcmi-fast export RUN --out FILE`: a run's network as a file for users without wcmi_fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from wcmi_fast.models.exporting import (
    BATCHES,
    PROGRAM,
    WEIGHTS,
    check_new_file,
    export,
    export_weights,
)
from wcmi_fast.training.trained import load_trained


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a finished run's network to a file that loads without wcmi_fast."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run of `wcmi-fast train`; of a head, encoder and head together."""
    out: Path
    """New file. NAME.pt2 is a program of torch.export, which torch alone runs; NAME.safetensors has
    the weights, and in its header the arguments of wcmi_fast.models.load."""
    input_shape: tuple[int, int, int] | None = None
    """Channels, height and width of an image; None takes them from the run's data."""


def execute(command: ExportCommand, console: Console) -> None:
    """Export, and say what the file computes and that it was compared."""
    check_new_file("export", command.out, (PROGRAM, WEIGHTS))  # before the network is loaded
    found = load_trained(command.run, input_shape=command.input_shape)
    if command.out.suffix == PROGRAM:
        agreement = export(found.model, command.out, input_shape=found.input_shape)
    else:
        agreement = export_weights(
            found.model,
            command.out,
            name=found.name,
            input_shape=found.input_shape,
            classes=found.outputs,
        )
    images = ", ".join(map(str, found.input_shape))
    kind = "representations" if found.task == "encoder" else "logits"
    lines = (
        f"{found.name}: images (N, {images}) in [0, 1] to {kind} (N, {found.outputs})",
        f"File: {command.out}, {command.out.stat().st_size / 1e6:.1f} MB",
        f"Loaded again, and compared on {sum(BATCHES)} random images: the outputs differ by "
        f"{agreement.outputs:.2g}, the input gradients by {agreement.gradients:.2g} of the largest",
    )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
