"""The benchmarks' gate: an incorrect provider is marked ``wrong`` and not timed."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gate, measure, providers
from benchmarks.cases import Case, local, matching, vicreg
from benchmarks.providers import DROP_IN, Provider
from benchmarks.timing import Bench
from vicreg_fast import reference
from vicreg_fast.precision import round_operand

CPU = torch.device("cpu")
Losses = dict[str, Tensor]


def judged(case: Case, losses: providers.Losses) -> measure.Record:
    """The entry of a provider that the gate refuses."""
    provider = Provider(losses)
    entry = measure.provider_record(provider)
    assert measure.prepare(case, provider, Bench(CPU), [case.inputs(0, CPU)], {}, entry) == []
    return entry


@pytest.mark.parametrize(("matmul", "refused"), [("highest", True), ("high", False)])
def test_tf32_in_place_of_float32_is_refused(matmul: str, refused: bool) -> None:
    case = vicreg(matmul, 256, 512)
    inputs = case.inputs(0, CPU)

    def rounded(z: Tensor) -> Tensor:
        c = z - z.mean(0)
        return c + (round_operand(c.detach(), "tf32") - c.detach())

    actual = gate.evaluate(case, lambda x, y: providers.eager(DROP_IN, rounded(x), rounded(y)), inputs)
    # Only the covariance: the invariance of centred views is another value.
    covariance = {name: actual[name] for name in ("cov-loss", "gradient of cov-loss")}
    errors = gate.errors(covariance, gate.truth(case, DROP_IN, inputs))
    assert (gate.wrong(errors, gate.BOUNDS[matmul]) is not None) == refused, errors


GATED: list[Case] = [vicreg(matmul, N, 256) for matmul in gate.BOUNDS for N in (64, 513)]
GATED += [
    local(matmul, 3, (20, 9), 64, matches, statistics=statistics)
    for matmul in gate.BOUNDS
    for matches, statistics in (((5, 4), "image"), (None, "slot"))
]
GATED += [matching(matmul, 3, (70, 50), 64, 20) for matmul in gate.BOUNDS]


@pytest.mark.parametrize("case", GATED, ids=lambda case: case.name)
def test_correct_providers_pass(case: Case) -> None:
    inputs = case.inputs(3, CPU)
    exact = gate.truth(case, providers.definition_of(case), inputs)
    for name, provider in providers.providers(case, CPU, ["eager", "cdist", "bmm", "aten"]):
        assert provider.losses is not None, name
        errors = gate.errors(gate.evaluate(case, provider.losses, inputs), exact)
        assert gate.wrong(errors, gate.BOUNDS[case.matmul]) is None, name


# The name of a term, and what a faulty provider makes of it; x - x.detach() is zero and has a gradient.
FAULTS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "value": ("loss", lambda loss, x: loss * 1.01),
    "gradient": ("loss", lambda loss, x: loss + 0.1 * (x - x.detach()).sum() / x.numel()),
    "covariance gradient": ("cov-loss", lambda loss, x: loss + 1e-3 * (x - x.detach()).sum()),
    "unwritten element": ("var-loss", lambda loss, x: torch.empty_like(loss)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_provider_is_not_timed(fault: str) -> None:
    case, (name, change) = vicreg("highest", 64, 64), FAULTS[fault]

    def faulty(x: Tensor, y: Tensor) -> Losses:
        losses = providers.eager(DROP_IN, x, y)
        return losses | {name: change(losses[name], x)}

    entry = judged(case, faulty)
    assert entry["status"] == "wrong"
    assert "allowed" in entry["reason"]


def test_matches_that_are_not_the_nearest_are_refused() -> None:
    case = matching("highest", 3, (70, 50), 64, 20)
    inputs = case.inputs(3, CPU)

    def other(x: Tensor, y: Tensor) -> Losses:
        matches = providers.eager_of(case, DROP_IN)(x, y)
        candidate = matches["candidate"].clone()
        candidate[1, 7] = (candidate[1, 7] + 1) % 50
        return {**matches, "candidate": candidate}

    errors = gate.errors(gate.evaluate(case, other, inputs), gate.truth(case, DROP_IN, inputs))
    assert "chosen" in str(gate.wrong(errors, gate.BOUNDS["bf16"]))


def test_failed_reference_is_recorded_and_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def no_memory(*args: Any) -> None:
        large = torch.ones(8)
        made.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gate, "truth", no_memory)
    entry = judged(vicreg("highest", 4, 8), lambda x, y: {})
    assert (entry["status"], entry["reason"]) == ("out of memory", "float64 reference: CUDA out of memory")
    assert [tensor() for tensor in made] == [None]


def test_inputs_have_distinct_matches() -> None:
    x, y, *_ = local("highest", 4, 49, 512, 20).inputs(0, CPU)
    d = reference.distances(x.detach().double(), y.detach().double()).min(-1).values.sort(-1).values
    assert ((d[:, 20] - d[:, 19]) / d[:, 19]).min() > 1e-4  # the last match and the first other patch


def test_torch_matmuls_have_the_shape_s_precision_and_are_restored() -> None:
    matmul, device = torch.backends.cuda.matmul, torch.device("cuda")
    before = matmul.fp32_precision
    for precision, setting in (("high", "tf32"), ("highest", "ieee"), (None, "ieee")):
        with providers.matmul_precision(precision, device):
            assert matmul.fp32_precision == setting
            # Inductor reads the older of torch's interfaces.
            assert torch.get_float32_matmul_precision() == ("high" if setting == "tf32" else "highest")
        assert matmul.fp32_precision == before
