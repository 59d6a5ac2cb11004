"""Both sides of the critic as one module, and its fast view for attacks (spec sections 1 and 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from wcmi_fast import reference
from wcmi_fast._ops import tail_width
from wcmi_fast.backends.memory import empty
from wcmi_fast.functional.tail import critic_tail
from wcmi_fast.models.critics import GlobalCritic, LocalCritic
from wcmi_fast.models.encoders import check_images
from wcmi_fast.models.folding import folded

# From this size on, the factorisation pays for itself within one attack (docs/benchmarks.md).
TRIANGULAR_UNITS = 512

# What the factor K = QR is computed in.
FROZEN_DTYPES = (torch.float32, torch.float64)

# Columns of the triangular factor that are multiplied together: fewer save more, but run slower.
FACTOR_BLOCK = 128


class DotCritic(nn.Module):
    """The paper's critic, T[i, j, p] = <z[i], h[j, p]>, with its 1x1 block fused.

    Computes what `GlobalCritic` and `LocalCritic` compute, with their weights (`global_`, `local`),
    but gives other features with the same products: the affine part of the images' layer norm
    belongs to the side of the representations, <z, g * v + b> = <z * g, v> + <z, b>, whose second
    term is one more column of z; that column of h is 1. So the images' features are stored once,
    and no more than that is kept for the backward pass. Both sides must come from one critic.

    Batch statistics are those of the hidden layer's inputs, of which it is a linear function: the
    mean and covariance of C inputs instead of the statistics of U outputs.

    Args:
        dim: size D of the representation.
        input_shape: (C, H, W) of one image, as for `LocalCritic`.
        units: size U of the features; 2048 in the paper.
        convolutions: 2 as in the authors' code, or 3 as in the supplement.

    Attributes:
        locations: P, the number of locations.

    Raises:
        TypeError, ValueError: as `GlobalCritic` and `LocalCritic`.
    """

    def __init__(
        self,
        dim: int,
        input_shape: tuple[int, int, int],
        *,
        units: int = 2048,
        convolutions: int = 2,
    ) -> None:
        super().__init__()
        self.global_ = GlobalCritic(dim, units=units)
        self.local = LocalCritic(input_shape, units=units, convolutions=convolutions)
        self.locations = self.local.locations

    def forward(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map representations g (N, D) and images x (N, C, H, W) to z (N, F) and h (N, P, F).

        Raises:
            ValueError: g or x of other shapes.
        """
        return self.z_side(g), self.x_side(x)

    def z_side(self, g: Tensor) -> Tensor:
        """Map representations g(x) (N, D), floating point, to z (N, F)."""
        return _with_affine(self.global_(g), self.local.block.norm)

    def x_side(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W), floating point, to h (N, P, F)."""
        check_images("DotCritic", x, self.local.input_shape)
        h = _block_features(self.local.block, _rows(self.local.convolutions(x)))
        return _by_image(h, len(x))

    def scores(self, g: Tensor, x: Tensor) -> Tensor:
        """Map representations and images to T (N, N, P)."""
        return _scores(*self(g, x))

    def frozen(self, *, triangular: bool | None = None) -> FrozenCritic:
        """Return a view for attacks: eval mode, fixed weights, batch norms folded.

        Args:
            triangular: whether to replace the U x U product, of which only the norm is wanted, by
                one with its triangular factor, at half of the operations and a QR decomposition
                once. None decides by the size.
        """
        if triangular is None:
            triangular = self.local.units >= TRIANGULAR_UNITS
        return FrozenCritic(self, triangular=triangular)


class FrozenCritic:
    """A `DotCritic` in eval mode with fixed weights, for attacks; made by `DotCritic.frozen`.

    With y = [relu(W1 v + b1); v; 1], the block before its layer norm is K y, and with K centred
    over the units the score is <z, K y> / |K y|. So with a triangular factor, K = QR, z is
    multiplied by K once, and only the norm needs a product with U x U weights, as |R y|. The
    features are then y / |K y|, and other than those of `DotCritic`, with the same products. Both
    sides must come from one view.

    Gradients flow to g and x and never to weights. A view of weights that have changed since
    (by an optimiser, ``load_state_dict``, ``.data``, or replaced) raises when it is used.

    Raises:
        TypeError: a critic whose dtype is not float32 or float64.
    """

    def __init__(self, critic: DotCritic, *, triangular: bool) -> None:
        self._critic = critic
        self._fingerprint = _fingerprint(critic)
        self.input_shape, self.locations = critic.local.input_shape, critic.locations
        snapshot: Any = folded(critic)
        self._global, self._convolutions = snapshot.global_, snapshot.local.convolutions
        with torch.inference_mode(False), torch.no_grad():
            self._freeze(snapshot.local.block, triangular=triangular)

    def _freeze(self, block: Any, *, triangular: bool) -> None:
        hidden, _, output = block.nonlinear
        if hidden.weight.dtype not in FROZEN_DTYPES:
            raise TypeError(
                f"DotCritic.frozen: weights have dtype {hidden.weight.dtype}, "
                f"wanted one of {FROZEN_DTYPES}"
            )
        self._norm = block.norm
        self._w1, self._b1 = hidden.weight, hidden.bias
        self._w2, self._b2, self._shortcut = output.weight, output.bias, block.shortcut.weight
        self._k: Tensor | None = None
        if triangular:
            centred = torch.cat([self._w2, self._shortcut, self._b2[:, None]], dim=1)
            centred -= centred.mean(dim=0)
            self._k = pad(centred, (0, tail_width(centred.shape[1] - 1) - centred.shape[1]))
            self._factor = _triangular_blocks(self._k)
            self._hidden = torch.cat([self._w1, self._b1[:, None]], dim=1)

    def __call__(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map representations g (N, D) and images x (N, C, H, W) to z (N, F) and h (N, P, F).

        Raises:
            ValueError: g or x of other shapes.
            RuntimeError: weights have changed since the view was made.
        """
        self._check_fresh()
        return self._z_side(g), self._x_side(x)

    def z_side(self, g: Tensor) -> Tensor:
        """Map representations g(x) (N, D), floating point, to z (N, F)."""
        self._check_fresh()
        return self._z_side(g)

    def x_side(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W), floating point, to h (N, P, F)."""
        self._check_fresh()
        return self._x_side(x)

    def scores(self, g: Tensor, x: Tensor) -> Tensor:
        """Map representations and images to T (N, N, P).

        Without gradients the features exist for a few images at a time only.
        """
        self._check_fresh()
        z = self._z_side(g)
        if torch.is_grad_enabled():
            return _scores(z, self._x_side(x))
        images = max(1, BLOCK_ROWS // self.locations)
        return torch.cat([_scores(z, self._x_side(part)) for part in x.split(images)], dim=1)

    def _z_side(self, g: Tensor) -> Tensor:
        z: Tensor = self._global(g)
        if self._k is None:
            return _with_affine(z, self._norm)
        constant = (z @ self._norm.bias)[:, None]
        return pad(torch.cat([(z * self._norm.weight) @ self._k, constant], dim=1), (0, 15))

    def _x_side(self, x: Tensor) -> Tensor:
        check_images("FrozenCritic", x, self.input_shape)
        return _by_image(self._block(_rows(self._convolutions(x))), len(x))

    def _block(self, rows: Tensor) -> Tensor:
        if self._k is None:
            weights = (self._w1, self._b1, self._w2, self._b2, self._shortcut)
            return critic_tail(rows, *weights, eps=self._norm.eps)
        h: Tensor = _FrozenBlock.apply(rows, self._hidden, self._factor, self._norm.eps)
        return h

    def _check_fresh(self) -> None:
        # A compiled program cannot see versions and bits: it does not check.
        if torch.compiler.is_compiling():
            return
        if _fingerprint(self._critic) != self._fingerprint:
            raise RuntimeError(
                "FrozenCritic: the critic's weights have changed since the view was made, "
                "wanted a new view by critic.frozen()"
            )


class _FrozenBlock(torch.autograd.Function):
    """Rows v to [y / |K y| * sqrt(U), 1, 0, ...], |K y| with the layer norm's eps."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        hidden: Tensor,
        factor: list[tuple[int, Tensor]],
        eps: float,
    ) -> Tensor:
        width, units = factor[0][1].shape[1], len(hidden)
        features = empty((len(rows), width + 16), rows)
        projected = empty((len(rows) if ctx.needs_input_grad[0] else 0, units), rows)
        rstd = rows.new_empty(len(rows))
        with _plain_products(rows):
            for part in _blocks(len(rows)):
                y = features[part][:, :width]
                _hidden_and_input(y, rows[part], hidden)
                squares = _project(y, factor, projected[part] if len(projected) else None)
                torch.rsqrt(squares / units + eps, out=rstd[part])
                y *= rstd[part][:, None]
                features[part][:, width:].zero_()
                features[part][:, width].fill_(1)
        ctx.factor, ctx.units = factor, units
        ctx.save_for_backward(features, projected, rstd, hidden)
        return features

    @staticmethod
    def backward(ctx: Any, dfeatures: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "FrozenCritic has no second derivative (create_graph=True), wanted DotCritic"
            )
        features, projected, rstd, hidden = ctx.saved_tensors
        factor, units = ctx.factor, ctx.units
        width, inputs = factor[0][1].shape[1], hidden.shape[1] - 1
        drows = rstd.new_empty((len(rstd), inputs))
        with _plain_products(features):
            for part in _blocks(len(rstd)):
                y, scale = features[part][:, :width], rstd[part][:, None]
                dy = dfeatures[part][:, :width] * scale
                # d rstd = <d(y rstd), y>, and rstd = (|K y|^2 / U + eps)^-1/2.
                slope = -(dy * y).sum(dim=1, keepdim=True) * scale / units
                for (first, block), q in zip(
                    factor, projected[part].split([len(b) for _, b in factor], dim=1), strict=True
                ):
                    dy[:, first:].addmm_(q * slope, block[:, first:])
                dhidden = dy[:, :units]
                _relu_backward_(dhidden, y[:, :units])
                torch.mm(dhidden, hidden[:, :inputs], out=drows[part])
                drows[part] += dy[:, units : units + inputs]
        return drows, None, None, None


# ---- parts --------------------------------------------------------------------------------------

# Rows that are computed together: intermediates of some MiB, products at full rate.
BLOCK_ROWS = 1024


def _blocks(count: int) -> list[slice]:
    return [slice(first, first + BLOCK_ROWS) for first in range(0, count, BLOCK_ROWS)]


def _plain_products(like: Tensor) -> torch.autocast:
    """Keep products in the dtype of their operands."""
    return torch.autocast(like.device.type, enabled=False)


def _rows(maps: Tensor) -> Tensor:
    """Turn feature maps (N, C, H, W) into rows (N * H * W, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _by_image(h: Tensor, images: int) -> Tensor:
    return h.view(images, -1, h.shape[1])


def _scores(z: Tensor, h: Tensor) -> Tensor:
    n, p, _ = h.shape
    return torch.mm(z, h.flatten(0, 1).t()).view(len(z), n, p)


def _with_affine(z: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Give z the affine part of the other side's layer norm: [z * g, <z, b>, 0, ...]."""
    units = z.shape[1]
    constant = (z @ norm.bias)[:, None]
    return pad(torch.cat([z * norm.weight, constant], dim=1), (0, tail_width(units) - units - 1))


def _block_features(block: Any, rows: Tensor) -> Tensor:
    """Return the block's features of rows (R, C), with its batch norm folded into the first layer.

    With batch statistics the block takes rows of mean 0: what the rows have in common then costs
    no precision.
    """
    hidden, norm, _, output = block.nonlinear
    b2 = output.bias
    if norm.training:
        rows, mean, variance = _batch_statistics(hidden.weight, rows)
        _update_running(norm, linear(mean, hidden.weight), variance, len(rows))
        b1, b2 = norm.bias, b2 + linear(mean, block.shortcut.weight)
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
    else:
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        b1 = norm.bias - norm.running_mean * scale
    w1 = hidden.weight * scale[:, None]
    return critic_tail(rows, w1, b1, output.weight, b2, block.shortcut.weight, eps=block.norm.eps)


def _batch_statistics(w1: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows less their mean (R, C), the mean (C,), and the variance of w1 rows (U,).

    The variance's value is computed in float64, because a covariance has squared what it is made
    of; its gradient has nothing to lose.
    """
    mean = rows.mean(dim=0)
    centred = rows - mean
    with torch.no_grad():
        exact = _linear_variance(w1.double(), centred.double()).to(w1.dtype)
    return centred, mean, reference.value_with_gradient(exact, _linear_variance(w1, centred))


def _linear_variance(w1: Tensor, centred: Tensor) -> Tensor:
    """Return the diagonal of w1 cov w1', cov the covariance of centred rows."""
    covariance = centred.t() @ centred / len(centred)
    return ((w1 @ covariance) * w1).sum(dim=1)


@torch.no_grad()
def _update_running(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor, count: int) -> None:
    if count < 2:
        raise ValueError(f"DotCritic: {count} row in training mode, wanted 2 or more")
    batches = norm.get_buffer("num_batches_tracked")
    batches += 1
    momentum = 1 / batches.item() if norm.momentum is None else norm.momentum
    norm.get_buffer("running_mean").lerp_(mean, momentum)
    norm.get_buffer("running_var").lerp_(variance * (count / (count - 1)), momentum)


def _triangular_blocks(k: Tensor) -> list[tuple[int, Tensor]]:
    """Return rows of the triangular factor of k with the first column that is not zero in them."""
    r: Tensor = torch.linalg.qr(k, mode="r").R
    return [(first, r[first : first + FACTOR_BLOCK]) for first in range(0, len(r), FACTOR_BLOCK)]


def _hidden_and_input(y: Tensor, rows: Tensor, hidden: Tensor) -> None:
    """Write y = [relu(W1 v + b1), v, 1, 0, ...] for rows v; hidden = [W1, b1]."""
    units, inputs = len(hidden), rows.shape[1]
    y[:, units : units + inputs] = rows
    # In place rather than assigned: torch 2.14 makes a tensor of an assigned number, on the host.
    y[:, units + inputs :].zero_()
    y[:, units + inputs].fill_(1)
    first = y[:, :units]
    _product(y[:, units : units + inputs + 1], hidden.t(), first)
    first.relu_()


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a b to out, also where a compiler must do it, which takes no strided ``out=``."""
    if torch.compiler.is_compiling():
        out.copy_(a @ b)
    else:
        torch.mm(a, b, out=out)


def _relu_backward_(d: Tensor, result: Tensor) -> None:
    """Multiply d by the derivative of relu, in place, given relu's result."""
    if torch.compiler.is_compiling():
        d.masked_fill_(result <= 0, 0)
    else:
        torch.ops.aten.threshold_backward(d, result, 0, grad_input=d)


def _project(y: Tensor, factor: list[tuple[int, Tensor]], keep: Tensor | None) -> Tensor:
    """Return |factor y|^2 of every row, and write factor y to `keep`."""
    squares = y.new_zeros(len(y))
    column = 0
    for first, block in factor:
        if keep is None:
            q = torch.mm(y[:, first:], block[:, first:].t())
        else:
            q = keep[:, column : column + len(block)]
            _product(y[:, first:], block[:, first:].t(), q)
        squares += torch.linalg.vector_norm(q, dim=1).square_()
        column += len(block)
    return squares


def _fingerprint(critic: nn.Module) -> list[tuple[str, int, int, int]]:
    """Return what changes when a weight or a running statistic of the critic does.

    The version counter misses writes through ``.data``; the sum of the bits shows them.
    """
    tensors = [*critic.named_parameters(), *critic.named_buffers()]
    return [
        (name, id(x), 0 if x.is_inference() else x._version, _bit_sum(x)) for name, x in tensors
    ]


def _bit_sum(x: Tensor) -> int:
    """Return the sum of a CPU tensor's bits as integers; 0 elsewhere, where it would wait."""
    if x.device.type != "cpu":
        return 0
    # Integer sums of their own width wrap around, which does no harm, and are the fastest.
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.dtype.itemsize]
    return int(x.detach().contiguous().view(kind).sum(dtype=kind))
