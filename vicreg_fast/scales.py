"""Every normalisation of the three terms and of their gradients, in one place.

A term is a scale times a sum.  With V views, ``pairs`` pairs, P problems of N samples and D features:

    inv = w_inv / (pairs P N D)    * sum over pairs of (x - y)^2
    var = w_var / (V P D)          * sum over columns of relu(gamma - std)
    cov = w_cov / (V P D f^2)      * sum of the squared off-diagonal elements of M

M is f C0 (primal) or f G (dual); f = 1 unless the backend passes another ``factor``.  On the dual side the sum is
sum(M^2) - f^2 sum(vhat^2).  The gradients with respect to a centred view c are, before the upstream gradient:

    inv   2 w_inv / (pairs P N D)           * (x - y)
    var  -  w_var / (V P D (N - 1))         * c / std       where std < gamma
    cov   4 w_cov / (V P D (N - 1) f)       * c M           primal; on the dual side M c - f c vhat

Derivation: docs/how-it-works.md.  Letters: docs/notation.md.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Scales(NamedTuple):
    """One factor for each term."""

    inv: float
    var: float
    cov: float


class Normalisation(NamedTuple):
    """What a group of views averages over."""

    views: int
    pairs: int
    P: int
    N: int
    D: int

    @property
    def differences(self) -> int:
        """Elements of (x - y) in all pairs, at least 1: the invariance is their mean square."""
        return max(1, self.pairs) * self.P * self.N * self.D

    @property
    def columns(self) -> int:
        """Columns of all views and problems: variance and covariance are means over them."""
        return self.views * self.P * self.D

    def terms(self, weights: Sequence[float], factor: float = 1.0) -> Scales:
        """Scales of the terms' values; ``factor``: f of the formulas above."""
        w_inv, w_var, w_cov = weights
        # f^2 comes first.  The order of the multiplications fixes the last bit.
        squared = factor**2 * self.views * self.P * self.D
        return Scales(w_inv / self.differences, w_var / self.columns, w_cov / squared)

    def gradients(self, weights: Sequence[float], factor: float = 1.0) -> Scales:
        """Scales of the terms' gradients."""
        w_inv, w_var, w_cov = weights
        degrees = self.columns * (self.N - 1)
        return Scales(2 * w_inv / self.differences, -w_var / degrees, 4 * w_cov / (degrees * factor))


def match_set_scales(weights: Sequence[float], B: int, D: int) -> tuple[Scales, Scales]:
    """Scales of one VICRegL loss over its two directions, for B images: of the values and of the gradients.

    They are those of :class:`Normalisation` with two pairs and four views, without the factors that depend on the number
    of matches m, which may differ between the directions.  The kernels divide the invariance and its gradient by m, and
    the other two gradients by m - 1.
    """
    w_inv, w_var, w_cov = weights
    pairs, views = 2 * B * D, 4 * B * D
    values = Scales(w_inv / pairs, w_var / views, w_cov / views)
    return values, Scales(2 * values.inv, -values.var, 4 * values.cov)
