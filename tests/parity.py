"""The error rule of data.py for kernels whose products may round their operands, on any device.

Against float64: twice the error of eager float32 on the same device, plus floors.  Kernels need two more floors: operands
may be rounded, and tensor cores truncate their float32 sums.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vicreg_fast import functional, reference
from vicreg_fast.sides import uses_dual

from .data import TERMS, Evaluated, U, evaluate

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
TF32, BF16 = 2.0**-11, 2.0**-9  # unit roundoffs, to nearest: 11 bits (float16 has as many) and 8
# Type of the inputs, precision, unit roundoff of the products' operands (0: they are not rounded).
KINDS = {
    "highest": (SINGLE, "highest", 0.0),
    "high": (SINGLE, "high", TF32),
    "medium": (SINGLE, "medium", BF16),
    "float16": (HALF, None, TF32),
    "float16-highest": (HALF, "highest", 0.0),
    "bfloat16": (BFLOAT, None, BF16),
    "bfloat16-highest": (BFLOAT, "highest", 0.0),
}


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda *shape: torch.randn(shape),
    "transposed": lambda *shape: torch.randn(*shape[:-2], shape[-1], shape[-2]).mT,
    "sliced": lambda *shape: torch.randn(*shape[:-2], 2 * shape[-2], 3 * shape[-1])[..., ::2, 1::3],
    "expanded": lambda *shape: torch.randn(shape[-2:]).expand(shape),
    "problems last": lambda *shape: torch.randn(*shape[-2:], *shape[:-2]).movedim((0, 1), (-2, -1)),
}


def covering_pairs(
    axes: dict[str, Sequence[Any]], cost: Callable[..., float] = lambda **case: 1.0
) -> list[dict[str, Any]]:
    """Cases in which every two values of different axes occur together, chosen greedily by new pairs per cost."""
    sizes = [len(values) for values in axes.values()]
    starts = list(itertools.accumulate(sizes, initial=0))
    count = starts[-1]
    candidates = []  # cost, case, indices of its pairs
    for choice in itertools.product(*map(range, sizes)):
        values = [start + k for start, k in zip(starts, choice, strict=False)]
        case = {name: axes[name][k] for name, k in zip(axes, choice, strict=True)}
        candidates.append((cost(**case), case, [a * count + b for a, b in itertools.combinations(values, 2)]))
    missing = bytearray(count * count)
    for *_, pairs in candidates:
        for index in pairs:
            missing[index] = 1
    chosen = []
    while any(missing):
        _, case, pairs = max(candidates, key=lambda c: sum(missing[index] for index in c[2]) / c[0])
        for index in pairs:
            missing[index] = 0
        chosen.append(case)
    return chosen


def pair(*shape: int, dtype: torch.dtype = SINGLE, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Two similar views, both leaves that require gradients."""
    x = 0.7 * torch.randn(shape, dtype=torch.float64)
    y = x + 0.1 * torch.randn(shape, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_(), y.to(device, dtype).requires_grad_()


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert [torch.equal(a, e) for a, e in zip(actual, expected, strict=True)] == [True] * len(expected)


def twice(error: Tensor) -> float:
    """The error that eager code's error allows: twice as much, and 0 where eager code overflows."""
    return 2 * float(error) if error.isfinite() else 0.0


def truncated(length: int, device: torch.device) -> float:
    """Relative error of a sum of ``length`` terms by the truncation of tensor cores; see Floors."""
    return U / 2 * min(length, 1024) if device.type != "cpu" else 0.0


class Floors:
    """Errors of a view's covariance term and of its gradient by rounding, besides those that eager code has as well.

    float32: as in data.py.

    Tensor cores truncate float32 sums (arXiv:2203.03341).  tf32x3 adds 3 products a step of 8 terms, and each addition errs
    towards zero by 0.7 u of the running sum, which is on average 2/3 of the final one: 0.18 u a term.  The floor is u / 2
    a term for up to 1024 terms, and twice that for a square; longer sums are added in parts.

    Operands rounded to ``unit``: the relative error of each is at most ``unit``, and errors are independent, so the squares
    of their effects add up.  One rounding errs by 0.4 units on average, two by 0.6.  Over many elements the norm of the
    effects stays below that of one unit each; over few elements a quarter more is allowed; for a single value 4 units are
    six standard deviations.  With o = c + e the operand, a = 4 / (D (N-1)), R = (c^2)'(c^2) / (N-1)^2 and
    s_n = |c_n|^2 / (N-1), the factor of e_n:

        value     a (c C0) e, the gradient times e, to first order; |e'c + c'e|^2 / (N-1)^2 / D to second, which is
                  2 unit^2 |s|^2 / D
        gradient  a [e C0 + c (e'c + c'e) / (N-1)]: the squares add up to unit^2 [c^2 C0^2 + 2 c^2 R + c^2 s^2]; and M
                  is rounded as an operand in turn: c^2 C0^2 primal, c^2 R + c^2 s^2 dual
    """

    def __init__(self, z: Tensor, unit: float, grad: Tensor) -> None:
        """z (..., N, D); ``grad``: the covariance term's true gradient, which its value's floor needs."""
        N, D = z.shape[-2:]
        P = math.prod(z.shape[:-2])
        dual = uses_dual(P, N, D)
        z = z.detach().double()
        c = z - z.mean(-2, keepdim=True)
        C = c.mT @ c / (N - 1)
        v = C.diagonal(dim1=-2, dim2=-1)
        C0 = C - v.diag_embed()
        s = c.square().sum(-1) / (N - 1)
        R = c.square().mT @ c.square() / (N - 1) ** 2
        share = 1 / (2 * P * D)  # of one problem of one view in the term

        norm, diagonal, row_sq_norms = (float(m.square().sum()) for m in (C, v, s))
        multiplied = norm - row_sq_norms if dual else float(C0.square().sum())
        self.value = share * (4 * U * norm if dual else 8 * U**2 * N * D * diagonal)
        self.value += share * truncated(D if dual else N, z.device) * 2 * max(multiplied, 0.0)
        self.value += 4 * unit * float((c * grad).norm()) + share * 2 * unit**2 * row_sq_norms

        a = 4 * share / (N - 1)
        self.gradient = 16 * U * a * float((c * v.unsqueeze(-2)).norm())
        self.gradient += (
            (truncated(N, z.device) + truncated(D, z.device)) * a * float((c @ (C if dual else C0)).norm())
        )
        squares = c.square() @ (2 * C0.square() + 3 * R) + 2 * c.square() * s.square().unsqueeze(-1)
        # The dual M has N^2 elements, each a factor in all D features.  A few of them do not average out: one may err by 1
        # unit instead of 0.4.  With two samples, the operand's roundings are also negatives of each other.
        few = 1.25 if N > 4 else 2.5 if N > 2 else 4.0
        self.gradient += few * unit * a * float(squares.sum().sqrt())


def scaled(
    function: Callable[..., tuple[Tensor, ...]], x: Tensor, y: Tensor, eps: float, scale: float
) -> Evaluated:
    """Like evaluate; gradients in the inputs' type are ``scale`` times as large, as with a GradScaler."""
    values, grads = evaluate(lambda *z, **options: [v * scale for v in function(*z, **options)], x, y, eps)
    return values / scale, [[g / scale for g in both] for both in grads]


def assert_parity(
    x: Tensor, y: Tensor, precision: str | None, unit: float, eps: float = 0.0, scale: float = 1.0
) -> None:
    """error(fast) <= 2 * error(eager float32) + floors, for the value and the gradients of each term."""
    truth, truth_grads = evaluate(reference.vicreg_terms, x.double(), y.double(), eps)
    eager, eager_grads = evaluate(reference.vicreg_terms, x.float(), y.float(), eps)
    triton = partial(functional.vicreg_terms, backend="triton", precision=precision)
    fast, fast_grads = scaled(triton, x, y, eps, scale)
    assert all(g.shape == x.shape for both in fast_grads for g in both)
    floors = [Floors(z, unit, t) for z, t in zip((x, y), truth_grads[2], strict=True)]
    for k, name in enumerate(TERMS):
        floor = {"inv": 8 * U * truth[k], "var": 8 * U, "cov": 8 * U * truth[k] + sum(f.value for f in floors)}
        allowed = twice((eager[k] - truth[k]).abs()) + floor[name] + 2.0**-149
        assert abs(fast[k] - truth[k]) <= allowed, name
        for z, g, e, t, f in zip((x, y), fast_grads[k], eager_grads[k], truth_grads[k], floors, strict=True):
            finfo = torch.finfo(z.dtype)
            # A few roundings of float32, one rounding to the input's type, and underflow in both types.
            rounding = (8 * U + (finfo.eps / 2 if z.dtype != SINGLE else 0.0)) * t.norm()
            underflow = (torch.finfo(SINGLE).tiny + finfo.tiny * finfo.eps / 2 / scale) * t.numel() ** 0.5
            allowed = twice((e - t).norm()) + rounding + underflow + (f.gradient if name == "cov" else 0.0)
            assert (g - t).norm() <= allowed, f"gradient of {name}"


def assert_nan_stays(shape: tuple[int, ...], kind: str, device: torch.device | str = "cpu") -> None:
    """A GPU's default NaN in one element shows in every loss and in its column's gradient.

    Its bits plus half a unit in the last place of TF32 or bfloat16 would be those of a finite value.
    """
    dtype, precision, _ = KINDS[kind]
    x, y = (z.detach() for z in pair(*shape, dtype=dtype, device=device))
    integer, bits = (torch.int32, 0x7FFFFFFF) if dtype == SINGLE else (torch.int16, 0x7FFF)
    y.view(integer)[-1, -1] = bits
    y.requires_grad_()
    losses = functional.vicreg_terms(x, y, backend="triton", precision=precision)
    (gradient,) = torch.autograd.grad(losses.cov, y)
    assert [bool(value.isnan()) for value in losses] == [True, True, True]
    assert gradient[:, -1].isnan().all()
