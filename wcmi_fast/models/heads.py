"""Classification heads on top of a representation (spec section 5)."""

from __future__ import annotations

from torch import Tensor, nn

from wcmi_fast.models.encoders import check_rows, check_size


class MLPHead(nn.Module):
    """The paper's MLP head: FC ``hidden``, dropout, batch norm, ReLU, FC ``classes``.

    Args:
        dim: size D of the representation.
        classes: number K of classes.
        hidden: units of the hidden layer.
        dropout: probability of dropping a hidden unit, before batch norm as in the authors' code.

    Raises:
        TypeError, ValueError: sizes that are not positive integers; dropout outside [0, 1].
    """

    def __init__(self, dim: int, classes: int, *, hidden: int = 200, dropout: float = 0.1) -> None:
        super().__init__()
        self.dim = check_size("MLPHead", "dim", dim)
        self.classes = check_size("MLPHead", "classes", classes)
        if not 0 <= dropout <= 1:
            raise ValueError(f"MLPHead: dropout is {dropout}, wanted a probability in [0, 1]")
        self.layers = nn.Sequential(
            nn.Linear(dim, check_size("MLPHead", "hidden", hidden)),
            nn.Dropout(dropout),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, g: Tensor) -> Tensor:
        """Map representations g(x) (N, D), floating point, to logits (N, K).

        Raises:
            ValueError: g is not (N, D).
        """
        check_rows("MLPHead", "g", g, self.dim)
        logits: Tensor = self.layers(g)
        return logits


class LinearHead(nn.Module):
    """The paper's linear head: FC ``classes``.

    Args:
        dim: size D of the representation.
        classes: number K of classes.

    Raises:
        TypeError, ValueError: sizes that are not positive integers.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.dim = check_size("LinearHead", "dim", dim)
        self.classes = check_size("LinearHead", "classes", classes)
        self.linear = nn.Linear(dim, classes)

    def forward(self, g: Tensor) -> Tensor:
        """Map representations g(x) (N, D), floating point, to logits (N, K).

        Raises:
            ValueError: g is not (N, D).
        """
        check_rows("LinearHead", "g", g, self.dim)
        logits: Tensor = self.linear(g)
        return logits
