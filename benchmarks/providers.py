"""The shapes that ``python -m benchmarks run`` measures, who computes the loss of each, and who is right."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_fast import VICRegLoss, backends, reference

Losses = Callable[[Tensor, Tensor], dict[str, Tensor]]
Inputs = tuple[Tensor, Tensor]
Gradients = dict[str, tuple[Tensor, ...]]

PROVIDERS = {
    "eager": "vicreg_fast/reference.py on the tensors as they are: bfloat16 tensors multiply in bfloat16, float32 ones "
    "in float32 or, at precision high, in TF32",
    "compile": "torch.compile of the same, dynamic=False, default mode",
    "aten": "VICRegLoss(backend='aten')",
    "triton": "VICRegLoss(backend='triton')",
}
# Of the drop-in: VICRegLoss's defaults.
_WEIGHTS = (25.0, 15.0, 1.0)
# What an error may be, relative to the size of the result, before a provider gets no time.  Seen on the shapes below
# (fewer rows at 64 features), on a CPU that rounds as a GPU does, of values and gradients:
#   highest  float32: at most 4e-7.  TF32 operands: 5e-5 and more, so that TF32 in its stead is refused.
#   high     TF32 operands truncated, as cuBLAS takes them: 1.7e-3; rounded to nearest: 2e-4.
#   bf16     eager code: 7e-3.  On a GPU split sums may be rounded to bfloat16 as well.  A tile that nobody wrote, one
#            of 272 at 2048 x 2048, is 6e-2 of a gradient.
_BOUNDS = {"highest": 2e-5, "high": 4e-3, "bf16": 3e-2}
_JUDGED = (
    "loss",
    "cov-loss",
)  # whose gradients: beside the others the covariance's alone could be lost in the sum


class Targets(NamedTuple):
    """How many times as fast as each provider Triton is asked to be, and its asked share of the floor; None: not."""

    eager: float | None = None
    compile: float | None = None
    aten: float | None = None
    floor: float | None = None


_NO_SLOWER = Targets(aten=1.0)


@dataclass(frozen=True)
class Shape:
    """Two views (N, D) of float32 at precision "highest" or "high", or of bfloat16 ("bf16")."""

    N: int
    D: int
    products: str
    targets: Targets = _NO_SLOWER

    @property
    def name(self) -> str:
        """As ``--shape`` takes it."""
        return f"{self.N}x{self.D}-{self.products}"

    @property
    def dtype(self) -> torch.dtype:
        """Of both views."""
        return torch.bfloat16 if self.products == "bf16" else torch.float32

    @property
    def precision(self) -> str | None:
        """As the losses take it; None: the inputs' own type decides."""
        return None if self.products == "bf16" else self.products

    @property
    def bound(self) -> float:
        """Largest relative error of a provider that gets a time."""
        return _BOUNDS[self.products]

    @property
    def operations(self) -> int:
        """Forward and backward of both views: half a Gram matrix of the smaller side, then a product with it."""
        return 6 * self.N * self.D * min(self.N, self.D)

    @property
    def bytes(self) -> int:
        """Six passes: forward reads both views, backward reads both and writes both gradients."""
        return 6 * self.N * self.D * self.dtype.itemsize

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        """Two views, the second a noisy copy of the first; features correlate and have means, as embeddings do."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        factors = 16
        mixing = 0.4 / math.sqrt(factors) * normal(factors, self.D)
        x = normal(self.N, self.D).mul_(0.5).addmm_(normal(self.N, factors), mixing).add_(0.3 * normal(self.D))
        y = normal(self.N, self.D).mul_(0.1).add_(x)
        return x.to(self.dtype).requires_grad_(), y.to(self.dtype).requires_grad_()


SHAPES = (
    Shape(256, 8192, "highest", Targets(60, 25, 1.5, 0.40)),
    Shape(256, 8192, "high", Targets(40, 20, 1.5, 0.35)),
    Shape(2048, 8192, "bf16", Targets(6, 5, 1.2, 0.60)),
    Shape(2048, 8192, "high", Targets(8, 6, 1.2, 0.65)),
    Shape(6528, 512, "bf16", Targets(4, 2.5, 1.5, 0.50)),
    Shape(2_600_000, 64, "bf16", Targets(5, 2, 2, 0.70)),
    # Never slower than ATen, small or not.
    Shape(64, 2048, "high"),
    Shape(256, 2048, "high"),
    Shape(512, 4096, "high"),
    Shape(2048, 2048, "high"),
    Shape(2048, 512, "high"),
    Shape(8192, 256, "high"),
    Shape(64, 64, "high"),
)


@contextmanager
def products_of(precision: str | None, device: torch.device) -> Iterator[None]:
    """Let torch's own float32 products be TF32 at "high" and float32 else, for eager code and for Inductor.

    By the older of torch's two interfaces, which sets both: where only ``fp32_precision`` was set, Inductor of torch
    2.11 and older reads the older one and raises.  A CPU multiplies float32 whatever is asked.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def eager(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The published code: no upcast, unlike ``backend="reference"``, which is there to be right."""
    inv, var, cov = (w * t for w, t in zip(_WEIGHTS, reference.vicreg_terms(x, y), strict=True))
    return {"inv-loss": inv, "var-loss": var, "cov-loss": cov, "loss": inv + var + cov}


def _eager_sum(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    # Compiled backward passes take a gradient of every output, zeros where nobody asks: no output but the sum.
    return {"loss": eager(x, y)["loss"]}


def providers(shape: Shape, device: torch.device) -> dict[str, Losses | str]:
    """By name, what computes the losses by name from two views, or why nothing does."""
    found: dict[str, Losses | str] = {"eager": eager}
    on_cpu = device.type == "cpu"
    if on_cpu:
        found["compile"] = "not timed on a CPU"
    else:
        # Compiled anew for each shape, as a user with one shape has it: Dynamo gives up after eight recompilations.
        torch.compiler.reset()
        found["compile"] = torch.compile(_eager_sum, dynamic=False)
    for backend in ("aten", "triton"):
        try:
            backends.choose(backend, device, (shape.dtype,))
            found[backend] = VICRegLoss(*_WEIGHTS, backend=backend, precision=shape.precision)
            if backend == "triton" and on_cpu:
                found[backend] = "Triton's interpreter is not timed"
        except ValueError as error:
            found[backend] = str(error)
    return found


class Evaluation(NamedTuple):
    """Losses by name, and gradients of two of them with respect to both views."""

    values: dict[str, Tensor]
    gradients: Gradients


def evaluate(losses: Losses, inputs: Inputs) -> Evaluation:
    """What a provider finds, in memory that was full of NaN: an element that it leaves unwritten is seen."""
    full_of_nan = [torch.full_like(z, math.nan) for z in 2 * inputs]
    del full_of_nan
    values = losses(*inputs)
    judged = [name for name in _JUDGED if name in values]
    gradients = {
        name: torch.autograd.grad(values[name], inputs, retain_graph=name != judged[-1]) for name in judged
    }
    return Evaluation({name: value.detach() for name, value in values.items()}, gradients)


def truth(inputs: Inputs) -> Evaluation:
    """The definition in float64, its gradients kept in float32: 6e-8 beside bounds of 2e-5 and more."""
    x, y = (z.detach().double().requires_grad_() for z in inputs)
    values, gradients = evaluate(eager, (x, y))
    return Evaluation(values, {name: tuple(g.float() for g in both) for name, both in gradients.items()})


def errors(found: Evaluation, true: Evaluation) -> dict[str, float]:
    """Relative error of every value, and of every gradient by its Euclidean norm, both views together."""
    relative = {
        name: float((value.double() / true.values[name] - 1).abs()) for name, value in found.values.items()
    }
    for name, gradients in found.gradients.items():
        error = size = 0.0
        for gradient, exact in zip(gradients, true.gradients[name], strict=True):
            error += float((gradient.double() - exact).square().sum())
            size += float(exact.double().square().sum())
        relative[f"gradient of {name}"] = math.sqrt(error / size) if size > 0 else math.inf
    return relative


def wrong(relative: dict[str, float], bound: float) -> str | None:
    """The worst of the errors in words where it passes the bound or is not a number; None where all is well."""
    bad: dict[str, Any] = {name: error for name, error in relative.items() if not error <= bound}
    if not bad:
        return None
    name = max(bad, key=lambda name: math.inf if math.isnan(bad[name]) else bad[name])
    return f"{name}: error {bad[name]:.1e} of its size against float64, {bound:.0e} allowed"
