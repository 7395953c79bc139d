"""The smaller side: on which matrix the covariance is computed, and which statistics are saved with it.

    primal   C = c'c / (N - 1), D x D         dual   G = c c' / (N - 1), N x N

c is a centred view (N, D).  ||C||_F = ||G||_F, so either matrix gives the covariance term.  Derivation of both sides and of
their gradients: docs/how-it-works.md.  Letters: docs/notation.md.
"""

import torch

# A sample count below this is small, with two consequences.  On the dual side with many columns the forward pass saves no
# moments: three values a column would take most of the workspace, which is bounded by twice the inputs, and it is cheap to
# centre so few rows again.  Squares of centred values are summed in float64: a few samples may lie so close together that
# their float32 squares underflow.
FEW_SAMPLES = 8
# Of two views, 192 KiB of float32 moments: few enough to save them always.
_FEW_COLUMNS = 1 << 13


def uses_dual(P: int, N: int, D: int) -> bool:
    """Whether the covariance of P problems (N, D) is computed on the dual side (N x N) instead of the primal (D x D).

    The dual side subtracts sum(v^2) from sum(G^2), which amplifies rounding by D / (D - N + 1): 5 at N = 0.8 D, 513 at
    1024 x 1025.  Above 0.8 D the primal side costs at most a quarter more.  A single problem with few features is primal
    too: its D x D matmul is cheap, and nothing is subtracted.
    """
    return 5 * N <= 4 * D and (D > 64 or P > 1)


def side_of(P: int, N: int, D: int) -> int:
    """Rows and columns of the matrix M of the side taken: N on the dual side, D on the primal."""
    return N if uses_dual(P, N, D) else D


def keeps_moments(P: int, N: int, D: int) -> bool:
    """Whether the forward pass saves the columns' moments for the backward pass."""
    return not uses_dual(P, N, D) or N >= FEW_SAMPLES or P * D <= _FEW_COLUMNS


def keeps_operand_variance(
    P: int, N: int, D: int, device: torch.device, matmul_precision: str = "ieee"
) -> bool:
    """Whether vhat is saved beside v: on the dual side, if a matmul may round its operands.

    On a CUDA device the answer does not depend on torch's global setting, which may change between tracing and running.
    """
    return uses_dual(P, N, D) and (matmul_precision != "ieee" or device.type == "cuda")
