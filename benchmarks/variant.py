"""What Triton compiles for a launch, described without a GPU: the kernel, its argument types, and its constants."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vicreg_fast.backends.triton import launch_timing

_POINTERS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


ArgumentPath = tuple[int, ...]  # of a kernel's argument: its position, and positions within NamedTuples


class Variant(NamedTuple):
    """A kernel and what Triton compiles it for."""

    kernel: Any
    signature: dict[str, Any]  # of a NamedTuple: a NamedTuple of its members' types
    constants: dict[ArgumentPath, Any]
    aligned: tuple[ArgumentPath, ...]  # arguments that are multiples of 16
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name, without what all kernels have in it."""
        return launch_timing.kernel_name(self.kernel)

    @property
    def is_aligned(self) -> bool:
        """Whether features are contiguous, and rows, problems and sizes are multiples of 16 elements."""
        for position, (name, members) in enumerate(self.signature.items()):
            if name in ("N", "D", "C") and (position,) not in self.aligned:
                return False
            for k, member in enumerate(getattr(members, "_fields", ()) if name in ("views", "x", "y") else ()):
                where = self.constants if member.endswith(("stride_d", "stride_c")) else self.aligned
                if "stride" in member and (position, k) not in where:
                    return False
        return True

    def key(self) -> str:
        """Identifies the variant."""
        return repr((self.kernel.__name__, self.signature, self.constants, self.aligned, self.options))

    @property
    def named_constants(self) -> dict[str, Any]:
        """The compile-time arguments by name; None for an argument that is absent."""
        names = self.kernel.arg_names
        return {names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}

    def __str__(self) -> str:
        named = self.named_constants
        blocks = [v for k, v in named.items() if k.startswith("BLOCK")]
        flags = [
            k.lower() if v is True else f"{k.lower()}={v}"
            for k, v in named.items()
            if k.isupper() and v and not k.startswith("BLOCK") and not k.endswith(("_TYPE", "PRECISION"))
        ]
        flags += [f"no {k.removesuffix('_ptr')}" for k, v in named.items() if v is None]
        pointers = [members[0] for name, members in self.signature.items() if name in ("views", "x")]
        inputs = pointers[0].strip("*") if pointers else ""
        name = self.name.replace("_forward", "")
        options = f"w{self.options['num_warps']}s{self.options.get('num_stages', '')}"
        return f"{name} {inputs} {'x'.join(map(str, blocks))} {options} {' '.join(flags)}"


def variant_of(kernel: Any, keywords: dict[str, Any]) -> Variant:
    """What Triton would compile for a launch: by each argument's type, and whether it is 1 or a multiple of 16."""
    constants: dict[ArgumentPath, Any] = {}
    aligned: list[ArgumentPath] = []

    def describe(value: Any, path: ArgumentPath, specialize: bool) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(describe(v, (*path, k), specialize) for k, v in enumerate(value)))
        if isinstance(value, Tensor):
            aligned.append(path)
            return "*" + _POINTERS[value.dtype]
        if value is None or (value == 1 and isinstance(value, int) and specialize):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and specialize:
            aligned.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature: dict[str, Any] = {}
    for position, parameter in enumerate(kernel.params):
        value = keywords[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[position,] = "constexpr", value
        else:
            signature[parameter.name] = describe(value, (position,), not parameter.do_not_specialize)
    options = {k: v for k, v in keywords.items() if k not in kernel.arg_names}
    return Variant(kernel, signature, constants, tuple(aligned), options)


def gpu_target(target: str) -> GPUTarget:
    """A target as Triton has it."""
    backend, arch = target.split(":")
    return GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)


def compile_for(variant: Variant, target: str) -> Any:
    """What Triton makes of a variant."""
    attributes = {path: [["tt.divisibility", 16]] for path in variant.aligned}
    source = ASTSource(variant.kernel, variant.signature, variant.constants, attributes)
    return triton.compile(source, target=gpu_target(target), options=variant.options)
