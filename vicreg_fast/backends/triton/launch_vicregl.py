"""Launches VICRegL's per-image statistics: one kernel forward, one backward, for both losses and both directions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import vicregl, vicregl_backward
from ...kernels.epilogue import Terms
from ...kernels.vicreg_backward import Upstream
from ...kernels.views import Views
from ...plan import Matches, Plan
from ...scales import match_set_scales
from ...sides import uses_dual
from .arguments import MatmulPolicy, block_of, is_aligned
from .configs import INTERPRETER, Device, Key, Local, LocalGradient, choose, launch_options

# Matches that one program holds: more do not fit its registers.
MOST_MATCHES = 64
# Columns at a time where each has one value; in the interpreter, which has no registers to run out of, one block.
_COLUMNS, _COLUMNS_INTERPRETED = 64, 512
# Patches and columns of the gradient kernel of whole images, and where it is used: on compute capability 8 and 12 it spills, or
# is no faster by the model; on AMD GPUs a barrier may not order what a program writes to memory and reads again.  Fewer patches
# or columns do not pay for its matrices.  Of more patches those that have a match are listed.
_IMAGE_BLOCK = 64
_IMAGE_ARCHITECTURES = ("sm90", "sm100", "interpreter")


def fits(plan: Plan) -> bool:
    """Whether these kernels can compute a plan: per-image statistics of matches of both kinds, up to 64 an image."""
    return (
        plan.losses == 2
        and bool(plan.match_counts)
        and not plan.per_slot
        and plan.covariance
        and max(plan.match_counts) <= MOST_MATCHES
    )


class _Shape(NamedTuple):
    """Sizes and blocks of a call."""

    B: int
    D: int
    m1: int
    m2: int
    dual: bool  # one side for both directions: that of the larger number of matches
    block_n: int
    block_f: int


def _shape(plan: Plan, x: Tensor) -> _Shape:
    B, _, D = x.shape
    m1, m2 = plan.match_counts
    block_n = block_of(max(m1, m2), MOST_MATCHES)
    # With many rows, 32 columns more of them do not fit the registers.
    block_f = block_of(D, 32 if block_n <= 32 else 16)
    return _Shape(B, D, m1, m2, uses_dual(B, max(m1, m2), D), block_n, block_f)


def keys(plan: Plan, sources: Sequence[Tensor], matmul: MatmulPolicy, device: Device) -> list[Key]:
    """What the configurations are chosen by, forward and backward."""
    B, m = sources[0].shape[0], max(plan.match_counts)
    patches = max(source.shape[1] for source in sources)
    aligned = all(is_aligned(source) for source in sources)
    # float32 maps take twice the registers of 16-bit ones, whatever their operands are rounded to.
    widened = matmul.kind == "half" and sources[0].dtype == torch.float32
    kind, gradient_kind = ("tf32", "tf32") if widened else (matmul.kind, matmul.gradient_kind)
    forward_key = Key(*device, aligned, "local", kind, B, m, patches)
    if _by_image(plan, sources, device):
        return [forward_key]
    return [forward_key, Key(*device, aligned, "local_gradient", gradient_kind, B, m, patches)]


def _by_image(plan: Plan, sources: Sequence[Tensor], device: Device) -> bool:
    """Whether the backward pass multiplies patches (vicregl_backward.py) and not matches (vicregl.py)."""
    _B, D, m1, m2, dual, block_n, _ = _shape(plan, sources[0])
    patches = max(source.shape[1] for source in sources)
    return (
        device.arch in _IMAGE_ARCHITECTURES
        and dual
        and m1 == m2
        and block_n <= 32
        and patches > _IMAGE_BLOCK // 2
        and D >= 4 * _IMAGE_BLOCK
        and patches * D < 2**31  # its offsets within an image's gradient are 32-bit
        and all(map(is_aligned, sources))
        and _fits_image(sources[0].dtype, patches, device)
    )


def _fits_image(dtype: torch.dtype, patches: int, device: Device) -> bool:
    """Whether the gradient kernel of whole images has the registers: on compute capability 9.0 and 10.0 others spilled."""
    if device == INTERPRETER:
        return True
    return dtype == torch.bfloat16 or (dtype == torch.float32 and patches <= _IMAGE_BLOCK)


def saved(
    plan: Plan, sources: Sequence[Tensor], matmul: MatmulPolicy, device: Device
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what the backward pass reads: the match sets' Gram matrices, flat, and sums of their columns.

    No Gram matrices on the primal side.
    """
    B, _, D = sources[0].shape
    m1, m2 = plan.match_counts
    gram = 4 * B * (m1 * m1 + m2 * m2) if uses_dual(B, max(m1, m2), D) else 0
    columns = 8 * B * _column_rows(plan, sources, device) * D
    return [
        ((gram if plan.save_for_backward else 0,), matmul.matrix_dtype),
        ((columns if plan.save_for_backward else 0,), torch.float32),
    ]


def _column_rows(plan: Plan, sources: Sequence[Tensor], device: Device) -> int:
    """Rows of ``columns``: lo, vhat and slope, and the views' first rows where the gradient of whole images follows."""
    return 4 if plan.save_for_backward and _by_image(plan, sources, device) else 3


def _views(sources: Sequence[Tensor], match_index: Tensor) -> Views:
    """The maps and the flat index as kernels take them: a problem is an image, and its rows are given by the index."""
    x, y = ((z, z.stride(0), 0, z.stride(1), z.stride(2)) for z in sources)
    return Views(*x, *y, match_index)


def terms(
    plan: Plan, sources: Sequence[Tensor], matches: Matches, matmul: MatmulPolicy, device: Device
) -> list[Tensor]:
    """[the plan's outputs, then the Gram matrices]."""
    config: Local = choose(keys(plan, sources, matmul, device)[0])
    x = sources[0]
    B, D, m1, m2, dual, block_n, block_f = _shape(plan, x)
    gram, columns = (
        torch.empty(size, dtype=dtype, device=x.device) for size, dtype in saved(plan, sources, matmul, device)
    )
    rows = _column_rows(plan, sources, device)
    # Freed when the forward pass returns.
    squares_dtype = torch.float64 if matmul.format == "fp32" else torch.float32
    squares = torch.empty(8 * B, D, dtype=squares_dtype, device=x.device)
    scratch = columns if columns.numel() else torch.empty(8 * B, rows, D, dtype=torch.float32, device=x.device)
    partials = torch.empty(2, 4 * B, 3, dtype=torch.float64, device=x.device)
    outputs = [torch.empty((), dtype=torch.float32, device=x.device) for _ in range(plan.outputs)]
    block_d = block_of(D, config.block_d)
    vicregl._vicregl_forward_kernel[(8 * B,)](
        views=_views(sources, matches.match_index), gram_ptr=gram if gram.numel() else None,
        columns_ptr=scratch, squares_ptr=squares, partials_ptr=partials,
        arrival_counter_ptr=matches.arrival_counter,
        location=Terms(*outputs[:4]), feature=Terms(*outputs[4:8]), total_ptr=outputs[8],
        scales=match_set_scales(_loss_weights(plan), B, D)[0],
        B=B, D=D, m1=m1, m2=m2, gamma=plan.gamma, eps=plan.eps,
        DUAL=dual, EVEN=_is_even(D, block_d, block_f, dual), FORMAT=matmul.format, OPERAND_TYPE=matmul.tl_dtype,
        DOT_PRECISION=matmul.dot_precision, PTX=device.arch.startswith("sm"),
        BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_F=block_f, COLUMN_ROWS=rows,
        BLOCK_S=_COLUMNS_INTERPRETED if device == INTERPRETER else _COLUMNS, **launch_options(device, config.warps),
    )  # fmt: skip
    return [*outputs, gram, columns]


def _is_even(D: int, block_d: int, block_f: int, dual: bool) -> bool:
    """Whether all blocks of columns are full: the kernels then need no mask."""
    return D % block_d == 0 and (dual or D % block_f == 0)


def _loss_weights(plan: Plan) -> list[float]:
    """The weights of a loss, from those of its groups."""
    return [w * plan.groups_per_loss for w in plan.weights]


def gradient(
    plan: Plan,
    sources: Sequence[Tensor],
    match_index: Tensor,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
    matmul: MatmulPolicy,
    device: Device,
) -> list[Tensor | None]:
    """Gradients of the maps that need one, in their type; None for a map that needs none."""
    gram, columns = saved
    x, y = sources
    B, D, m1, m2, dual, block_n, block_f = _shape(plan, x)
    # Both directions of a loss have the same upstream gradients.
    location, feature = upstream[:3], upstream[3 * plan.groups_per_loss :][:3]
    x_grad, y_grad = (
        torch.empty(source.shape, dtype=source.dtype, device=source.device) if need else None
        for source, need in zip(sources, needs, strict=True)
    )
    grads = [grad for grad in (x_grad, y_grad) if grad is not None]
    arguments: dict[str, Any] = {
        "views": _views(sources, match_index), "gram_ptr": gram if gram.numel() else None, "columns_ptr": columns,
        "x_grad_ptr": x_grad, "y_grad_ptr": y_grad, "location": Upstream(*location), "feature": Upstream(*feature),
        "scales": match_set_scales(_loss_weights(plan), B, D)[1],
        "B": B, "L1": x.shape[1], "L2": y.shape[1], "D": D, "m1": m1, "m2": m2,
        "FORMAT": matmul.format, "OPERAND_TYPE": matmul.tl_dtype,
        "DOT_PRECISION": matmul.dot_precision, "EXACT_PRECISION": matmul.exact_precision, "BLOCK_N": block_n,
    }  # fmt: skip
    if _by_image(plan, sources, device):
        programs = B * len(grads)
        listed = max(source.shape[1] for source in sources) > _IMAGE_BLOCK
        block_l = 4 * block_n if listed else _IMAGE_BLOCK
        part = torch.float32 if device == INTERPRETER else torch.bfloat16
        parts = {"bf16": 1, "fp32": 3}.get(matmul.format, 2)
        vicregl_backward._vicregl_image_gradient_kernel[(programs,)](
            **arguments,
            patch_numbers_ptr=torch.empty(programs, 10, block_l, dtype=torch.float32, device=x.device),
            matrices_ptr=torch.empty(programs, 2 + parts, block_l, block_l, dtype=part, device=x.device),
            EVEN=_is_even(D, _IMAGE_BLOCK, block_f, dual), LISTED=listed, PARTS=parts, PTX=device.arch.startswith("sm"),
            BLOCK_L=block_l, BLOCK_D=_IMAGE_BLOCK, **launch_options(device, warps=block_l // 16),
        )  # fmt: skip
        return [x_grad, y_grad]
    _, gradient_key = keys(plan, sources, matmul, device)
    config: LocalGradient = choose(gradient_key)
    block_l = block_of(max(grad.shape[1] for grad in grads), config.block_l)
    # One gradient alone takes more registers a column than each of two.
    block_d = block_of(D, config.block_d if len(grads) == 2 else max(16, config.block_d // 2))
    tiles = sum(-(-grad.shape[1] // block_l) for grad in grads)
    vicregl._vicregl_gradient_kernel[(B * tiles * -(-D // block_d),)](
        **arguments, DUAL=dual, EVEN=_is_even(D, block_d, block_f, dual),
        BLOCK_L=block_l, BLOCK_D=block_d, BLOCK_F=block_f, **launch_options(device, config.warps),
    )  # fmt: skip
    return [x_grad, y_grad]
