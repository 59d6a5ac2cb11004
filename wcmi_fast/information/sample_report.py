"""What an estimate between two samples returns: every bound, which one to take, and doubts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from wcmi_fast.information.results import Estimate, Evidence, Flag, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

CAVEAT = (
    "Lower bounds in expectation: what a critic of this size finds in a sample of this size. The"
    " interval says what other test rows, and critics trained anew, would give; not how far the"
    " truth lies above."
)


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """Information between two samples by every bound; prints as a table.

    Attributes:
        estimates: of each bound, on the held-out half.
        validation: of each bound, nats on the validation rows, mean over trials.
        best: the lower bound of the highest validation value; the test rows have no part in it.
        flags: reasons to doubt the numbers.
        evidence: of each trial's critic.
        settings: all that the numbers depend on, and versions.
        seconds: time that it took.
        caveat: what the numbers are not.
    """

    estimates: Mapping[str, Estimate]
    validation: Mapping[str, float]
    best: str
    flags: tuple[Flag, ...]
    evidence: tuple[Evidence, ...]
    settings: Mapping[str, Any]
    seconds: float
    caveat: str = field(default=CAVEAT)

    @property
    def information(self) -> Estimate:
        """Return the estimate of the best bound."""
        return self.estimates[self.best]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; null where a number is not finite."""
        found = asdict(self)
        for name, estimate in self.estimates.items():
            found["estimates"][name] |= {"bits": estimate.bits, "trials": list(estimate.trials)}
        found["flags"] = [asdict(flag) | {"docs": flag.docs} for flag in self.flags]
        made: dict[str, Any] = plain(found)
        return made

    def __rich__(self) -> RenderableType:
        """Return the table that a terminal shows."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Information between two samples")
        for column in ("bound", "nats", "± s.e.", "95 % interval", "bits", "validation, nats"):
            table.add_column(column, justify="left" if column == "bound" else "right")
        for name, estimate in self.estimates.items():
            low, high = estimate.interval
            chosen = f"{name} (best)" if name == self.best else name
            table.add_row(
                chosen,
                f"{estimate.mean:.4f}",
                f"{estimate.standard_error:.4f}",
                f"{low:.4f} to {high:.4f}",
                f"{estimate.bits:.4f}",
                f"{self.validation[name]:.4f}",
            )
        doubts = [Text(f"{flag.name}: {flag.sentence} See {flag.docs}.") for flag in self.flags]
        return Group(table, *doubts, Text(self.caveat))

    def __str__(self) -> str:
        """Return the table as text."""
        from rich.console import Console

        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def plot(self) -> Figure:
        """Return a figure: every bound's estimate with its interval.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 0.6 + 0.5 * len(self.estimates)))
        axes = figure.add_subplot(xlabel="nats", yticks=range(len(self.estimates)))
        axes.set_yticklabels(list(self.estimates))
        for row, estimate in enumerate(self.estimates.values()):
            low, high = estimate.interval
            reach = [[estimate.mean - low], [high - estimate.mean]]
            axes.errorbar([estimate.mean], [row], xerr=reach, fmt="o", capsize=4)
        return figure
