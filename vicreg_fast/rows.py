"""How the rows of a problem are addressed: one formula for every loss.

A view is P problems of N rows of D features.  L is the number of patches of an image.  Element (p, n, d) lies at

    ptr + p * s_p + n * s_n + patch[p, n] * s_i + d * s_d

- No patch, problems first: s_i = 0.  The source is (P, N, D), a plain batch of embeddings.
- No patch, ``per_slot``: s_i = 0.  The source is (N, P, D).  Problem p is patch p of every image.
- A patch: s_n = 0, and s_i is the patch stride.  The source is (P, L, D).  Problem p is image p, and its row n is patch
  patch[p, n].
- A patch, ``per_slot``: s_p = 0, s_n is the image stride, and s_i the patch stride.  The source is (N, L, D).  Problem p is
  match slot p, and its row n is patch patch[p, n] of image n.

A source may have any strides.  Letters: docs/notation.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """A block of a view: slices of its problems, rows and features."""

    problems: slice
    rows: slice
    features: slice

    def of_columns(self, statistic: Tensor) -> Tensor:
        """The block's columns of a statistic (..., P, V, 1, D), which has one value a column."""
        return statistic if self is FULL_VIEW else statistic[..., self.problems, :, :, self.features]


# Every element of a view.  It is compared by identity, and nothing is sliced: five slices cost more than a small loss.
FULL_VIEW = Block(slice(None), slice(None), slice(None))


class Rows(NamedTuple):
    """One view: a three-dimensional source, whose last dimension is D, and the rows of it that form the problems."""

    source: Tensor
    patch: Tensor | None = None
    per_slot: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, N, D)."""
        first, second = self.source.shape[:2] if self.patch is None else self.patch.shape
        if self.patch is None and self.per_slot:
            first, second = second, first
        return first, second, self.source.shape[2]

    def _image(self, block: Block) -> Tensor:
        """The image of every row of a block, broadcastable to (p, n); for a source of patches."""
        image = torch.arange(self.source.shape[0], device=self.source.device)
        return image[block.rows][None, :] if self.per_slot else image[block.problems][:, None]

    def _row(self, block: Block, patch: Tensor) -> Tensor:
        """Indices (p * n,) of a block's rows in the source with its first two dimensions flattened."""
        return torch.add(patch, self._image(block), alpha=self.source.shape[1]).flatten()

    def of(self, tensor: Tensor, block: Block) -> Tensor:
        """The block (p, n, d) of a tensor of the source's shape, as a view of it; only without ``patch``."""
        if self.per_slot:
            tensor = tensor.transpose(0, 1)
        return tensor if block is FULL_VIEW else tensor[block]

    def read(self, block: Block) -> Tensor:
        """The block (p, n, d), in the source's type; without ``patch`` it is a view of the source."""
        if self.patch is None:
            return self.of(self.source, block)
        source = self.source if block is FULL_VIEW else self.source[:, :, block.features]
        patch = self.patch if block is FULL_VIEW else self.patch[block.problems, block.rows]
        if source.stride(0) != source.shape[1] * source.stride(1):
            return source[self._image(block), patch]
        # One index a row instead of two takes a fifth of the time (16 images of 196 patches, 20 gathered, 384 channels).
        flat = source.flatten(0, 1)
        return flat.index_select(0, self._row(block, patch)).view(*patch.shape, -1)

    def add(self, total: Tensor, block: Block, values: Tensor) -> None:
        """Add ``values`` (p, n, d) to the block's rows of ``total``, which is contiguous and has the source's shape.

        Values of a row that occurs more than once in ``patch`` are added in a fixed order: ``index_add_`` is serial on a
        CPU, and ``index_put_`` sorts on a GPU, where ``index_add_`` would race.
        """
        if self.patch is None:
            self.of(total, block).add_(values)
            return
        row = self._row(block, self.patch[block.problems, block.rows])
        flat = total[:, :, block.features].flatten(0, 1)  # a view: total is contiguous
        if total.device.type == "cpu":
            flat.index_add_(0, row, values.flatten(0, 1))
        else:
            flat.index_put_((row,), values.flatten(0, 1), accumulate=True)
