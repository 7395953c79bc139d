"""Every check of arguments, and its error message.

Checks use types, shapes, devices and Python numbers.  They read no tensor that lies on another device than the CPU.
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .precision import PRECISIONS

STATISTICS = ("image", "slot")
MATCH_ORDERS = ("distance", "patch")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_COORDINATES = (2, 3)
_CPU = torch.device("cpu")


def _show(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    """``value`` is one of ``known``."""
    if not any(value is option or (isinstance(value, str) and value == option) for option in known):
        raise ValueError(f"{name} needs one of {', '.join(map(repr, known))}, got {value!r}")


def backend_and_precision(backend: object, precision: object) -> None:
    """Both are known."""
    one_of("backend", backend, BACKENDS)
    one_of("precision", precision, PRECISIONS)


def _number(name: str, value: object, need: str) -> float | None:
    """The value of a real number.  None: a tensor that is not read, on another device than the CPU or in traced code."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor | numbers.Real):
        raise TypeError(f"{name} needs {need}, got {type(value).__name__} {_show(value)}")
    if isinstance(value, Tensor):
        dense(name, value)
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name} needs {need} with one element, got {_show(value)} of {value.dtype}")
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return float(value.detach())
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of float
        return math.inf if isinstance(value, int) and value > 0 else -math.inf


def _finite(number: float) -> bool:
    # math.isfinite is a graph break on the symbolic float that a changing attribute becomes.
    return -math.inf < number < math.inf


def coefficient(name: str, value: object, losses_of: Tensor | None = None) -> None:
    """A finite number of either sign, or a tensor with one element, which is read only if it lies on the CPU.

    If ``losses_of`` is given, the coefficient multiplies its losses: a tensor must lie on its device or on the CPU.
    """
    number = _number(name, value, "a number or a tensor")
    if losses_of is not None and isinstance(value, Tensor) and value.device not in (_CPU, losses_of.device):
        raise ValueError(
            f"{name} needs device cpu or that of the inputs, {losses_of.device}, got {value.device}"
        )
    if number is not None and not _finite(number):
        raise ValueError(f"{name} needs a finite number, got {number}")


def nonnegative(name: str, value: object) -> float:
    """A finite number of at least 0, as a float."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} needs a Python number, got {_show(value)}")
    number = _number(name, value, "a number")
    if number is None or not 0 <= number < math.inf:
        raise ValueError(f"{name} needs a finite number >= 0, got {number}")
    return number


def flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} needs True or False, got {type(value).__name__} {_show(value)}")


def alpha(value: object) -> float:
    """A Python number in [0, 1].  It decides which parts are computed, so the host must know it."""
    if isinstance(value, Tensor):
        raise TypeError(f"alpha needs a Python number in [0, 1], got {_show(value)}")
    number = _number("alpha", value, "a number in [0, 1]")
    if number is None or not 0.0 <= number <= 1.0:
        raise ValueError(f"alpha needs a number in [0, 1], got {number}")
    return number


_AN_IMAGES_SAMPLES = " with statistics='image', whose samples are an image's matches"


def match_count(value: object, need: str = "a whole number", least: int = 1) -> int:
    """An integer of at least ``least``: 1, or 2 for per-image statistics, whose samples are the matches."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt | numbers.Integral):
        raise TypeError(f"num_matches needs {need}, got {type(value).__name__} {_show(value)}")
    if value < least:
        because = _AN_IMAGES_SAMPLES if least > 1 else ""
        raise ValueError(f"num_matches needs to be at least {least}{because}, got {value}")
    return value if isinstance(value, int | torch.SymInt) else int(value)  # type: ignore[return-value]


def num_matches(value: object, statistics: str) -> tuple[int, int] | None:
    """Numbers of matches of both directions, from an integer or a pair of integers; None: every patch is matched."""
    need = "a whole number, a pair of them or None"
    least = 2 if statistics == "image" else 1
    if value is None:
        return None
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"num_matches needs {need}, got {len(value)} numbers")
        first, second = (match_count(count, need, least) for count in value)
        return first, second
    count = match_count(value, need, least)
    return count, count


def tensors(named: Mapping[str, Any], ndim: int | None, shape: str, *, integers: bool = False) -> None:
    """Floating tensors of ``ndim`` dimensions (None: at least two) on one device; ``integers``: or integer tensors."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} needs a tensor of shape {shape}, got {type(value).__name__}")
        dense(name, value)
        if value.ndim != ndim if ndim is not None else value.ndim < 2:
            raise ValueError(f"{name} needs shape {shape}, got {tuple(value.shape)}")
        if value.dtype not in (_FLOATING + _INTEGERS if integers else _FLOATING):
            need = "float16, bfloat16, float32, float64" + (" or an integer type" if integers else "")
            raise TypeError(f"{name} needs dtype {need}, got {str(value.dtype)[6:]}")
    one_device(named)


def dense(name: str, value: Tensor) -> None:
    """A dense tensor: neither sparse, nor nested, nor of any other layout."""
    if value.is_nested or value.layout is not torch.strided:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} needs a dense tensor, got layout {layout}")


def one_device(named: Mapping[str, Any]) -> None:
    """The tensors among the arguments lie on one device."""
    present = [(name, value) for name, value in named.items() if isinstance(value, Tensor)]
    for name, b in present[1:]:
        first, a = present[0]
        if b.device != a.device:
            raise ValueError(f"{name} needs the device of {first}, {a.device}, got {b.device}")


def samples(name: str, count: int) -> None:
    """At least two samples.  If the batch is gathered, they are counted over all ranks."""
    if count < 2:
        raise ValueError(f"{name} needs at least 2 samples to have a variance, got {count}")


def views(named: Mapping[str, Any], ndim: int | None = None, *, count_samples: bool = True) -> None:
    """Embeddings of one shape (..., N, D) on one device, N >= 2 and D >= 1."""
    tensors(named, ndim, "(N, D)" if ndim == 2 else "(..., N, D)")
    (first, a), *remaining = named.items()
    for name, b in remaining:
        if b.shape != a.shape:
            raise ValueError(f"{name} needs the shape of {first}, {tuple(a.shape)}, got {tuple(b.shape)}")
    if a.shape[-1] < 1:
        raise ValueError(f"{first} needs at least 1 feature, got shape {tuple(a.shape)}")
    if count_samples:
        samples(first, a.shape[-2])
    if math.prod(a.shape[:-2]) < 1:
        raise ValueError(f"{first} needs at least 1 problem in its leading dimensions, got {tuple(a.shape)}")


def _same(name: str, value: Tensor, first: str, other: Tensor, dims: tuple[int, ...], what: str) -> None:
    got, need = tuple(value.shape[d] for d in dims), tuple(other.shape[d] for d in dims)
    if got != need:
        raise ValueError(
            f"{name} needs the {what} of {first}, {tuple(other.shape)}, got shape {tuple(value.shape)}"
        )


def patches(queries: tuple[str, Any], candidates: tuple[str, Any], *, integers: bool = False) -> None:
    """Two maps (B, P1, C), (B, P2, C) with at least one image, patch and channel each."""
    tensors(dict((queries, candidates)), 3, "(B, P, C)", integers=integers)
    for name, value in (queries, candidates):
        if value.numel() == 0:
            raise ValueError(
                f"{name} needs at least 1 image, patch and channel, got shape {tuple(value.shape)}"
            )
    _same(candidates[0], candidates[1], queries[0], queries[1], (0, 2), "images and channels")


def enough_patches(name: str, patches: Tensor, num_matches: int) -> None:
    """At least ``num_matches`` query patches."""
    if patches.shape[1] < num_matches:
        raise ValueError(
            f"num_matches={num_matches} needs as many patches in {name}, got shape {tuple(patches.shape)}"
        )


def local_inputs(
    maps: Mapping[str, Any],
    locations: Mapping[str, Any],
    num_matches: tuple[int, int] | None,
    statistics: str,
) -> tuple[int, int]:
    """Both views' maps (B, P, C) and locations (B, P, 2) or (B, P, 3); returns the match counts of both directions."""
    (first, x1), (second, x2) = maps.items()
    patches((first, x1), (second, x2))
    counts = (x1.shape[1], x2.shape[1]) if num_matches is None else num_matches
    for (name, value), count in zip(maps.items(), counts, strict=True):
        enough_patches(name, value, count)
        if statistics == "image" and count < 2:
            raise ValueError(f"{name} needs at least 2 patches{_AN_IMAGES_SAMPLES}, got {tuple(value.shape)}")
    one_device({first: x1, **locations})
    tensors(locations, 3, "(B, P, 2) or (B, P, 3)", integers=True)
    for (name, value), (map_name, map_) in zip(locations.items(), maps.items(), strict=True):
        _same(name, value, map_name, map_, (0, 1), "images and patches")
        if value.shape[2] not in _COORDINATES:
            raise ValueError(f"{name} needs 2 or 3 coordinates in its last dimension, got {tuple(value.shape)}")
    (name_1, l1), (name_2, l2) = locations.items()
    _same(name_2, l2, name_1, l1, (2,), "coordinates")
    return counts


def distance_matrix(distances: Any, queries: Tensor, candidates: Tensor) -> None:
    """Distances (B, P1, P2) of two maps."""
    tensors({"distances": distances}, 3, "(B, P1, P2)")
    one_device({"input_maps": queries, "distances": distances})
    need = (queries.shape[0], queries.shape[1], candidates.shape[1])
    if tuple(distances.shape) != need:
        raise ValueError(f"distances needs shape {need}, got {tuple(distances.shape)}")
