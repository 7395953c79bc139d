"""Kernels that cannot be compiled, loaded or launched: which errors say so, what is remembered of them, and the warning.

An error is the kernels' own if Triton raised it while one of them was compiled, loaded or launched.  Not their own is what a
launch only reports: memory that ran out, and errors of earlier work, which a GPU reports at whatever it is asked next.
"""

import errno
import threading
import warnings
from collections.abc import Iterator

import torch

# Why the kernels failed, by device.  Never taken back, so that a forward and its backward pass agree.  Texts and not errors:
# an error's traceback would keep the tensors of its frames.
reasons: dict[torch.device, str] = {}

_warned: set[str] = set()
_lock = threading.Lock()
# Triton passes a driver's error on as a RuntimeError that starts with this.
_DRIVER_ERROR = "Triton Error ["
# Texts of the driver's errors that concern the kernel that is loaded or launched, as CUDA and HIP word them.
_ABOUT_THE_KERNEL = (
    "invalid argument",
    "invalid configuration argument",
    "invalid device function",
    "device kernel image is invalid",
    "invalid kernel file",
    "no kernel image is available",
    "named symbol not found",
    "shared object initialization failed",
    "PTX JIT",  # compilation failed, compilation was disabled, compiler library not found
    "unsupported toolchain",  # PTX of a newer version than the driver's
    "too many resources requested for launch",
    "out of resources required to launch",
)
# A reason is cut to this many characters: Triton's errors may contain a kernel's source or the assembler's log.
_LONGEST_REASON = 400


def caused_by_kernels(error: Exception) -> bool:
    """Whether an error that a backend raised says that its kernels cannot run."""
    if any(map(_has_another_cause, _with_causes(error))):
        return False
    if isinstance(error, RuntimeError) and str(error).startswith(_DRIVER_ERROR):
        return any(text in str(error) for text in _ABOUT_THE_KERNEL)
    return _raised_by_triton(error)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from: Triton's compiler wraps what it meets."""
    while error is not None:
        yield error
        error = error.__cause__


def _has_another_cause(error: BaseException) -> bool:
    """Memory that ran out, earlier work on a GPU (torch's AcceleratorError), or a warning that a filter makes an error."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | MemoryError | Warning):
        return True
    return isinstance(error, OSError) and error.errno == errno.ENOMEM


def _raised_by_triton(error: Exception) -> bool:
    """Whether the library's innermost function was in a call of Triton when the error was raised.

    Not only whether Triton occurs in the traceback: a launch that is recorded calls the library back (launch_timing.py).
    """
    package = __name__.partition(".")[0]
    by_triton, traceback = False, error.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        by_triton = module == "triton" or (by_triton and module != package)
        traceback = traceback.tb_next
    return by_triton


def describe(error: Exception) -> str:
    """An error in one line: its type and its text, without the middle of a long text."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    half = _LONGEST_REASON // 2
    return text if len(text) <= _LONGEST_REASON else f"{text[:half]} ... {text[-half:]}"


def record(device: torch.device, error: Exception) -> None:
    """Remember that the kernels failed on a device, and warn.

    The warning comes last: under a filter that turns it into an error, the next call finds what is remembered.
    """
    with _lock:
        reason = reasons.setdefault(device, describe(error))
    warn(f" on {device}", reason)


def warn(where: str, reason: str) -> None:
    """Warn of a reason, once: several devices mostly have the same one."""
    with _lock:
        if reason in _warned:
            return
        _warned.add(reason)
    warnings.warn(
        f"the Triton kernels cannot run{where}: {reason.rstrip('.')}. The ATen backend computes this call and all later "
        f"ones{where}. To see the whole error, call with backend='triton'",
        stacklevel=2,
    )
