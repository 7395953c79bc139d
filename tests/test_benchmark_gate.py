"""The benchmarks' gate, which gives no time to who is wrong: whom it lets pass, whom it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cases, machine, providers
from benchmarks.cases import Case, Local, Matching, VICReg
from vicreg_fast import reference
from vicreg_fast.precision import round_operand

CPU = torch.device("cpu")


@pytest.mark.parametrize(("products", "refused"), [("highest", True), ("high", False)])
def test_gate_tells_tf32_from_float32(products: str, refused: bool) -> None:
    case = VICReg(products, N=256, D=512)
    inputs = case.inputs(0, CPU)

    def rounded(z: Tensor) -> Tensor:
        c = z - z.mean(0)
        return c + (round_operand(c.detach(), "tf32") - c.detach())

    found = providers.evaluate(case, lambda x, y: providers.eager(rounded(x), rounded(y)), inputs)
    # The invariance is taken from the centred views here, which changes its value a little: not what is judged.
    values = {"cov-loss": found.values["cov-loss"]}
    judged = providers.Evaluation(values, {"cov-loss": found.gradients["cov-loss"]})
    true = providers.truth(case, providers.DROP_IN, inputs)
    reason = providers.wrong(providers.errors(judged, true), providers.BOUNDS[products])
    assert (reason is not None) == refused, reason


GATED: list[Case] = [VICReg(products, N=N, D=256) for products in providers.BOUNDS for N in (64, 513)]
GATED += [
    Local(products, B=3, patches=(20, 9), C=64, matches=matches, statistics=statistics)
    for products in providers.BOUNDS
    for matches, statistics in (((5, 4), "image"), (None, "slot"))
]
GATED += [Matching(products, B=3, patches=(70, 50), C=64, matches=20) for products in providers.BOUNDS]


@pytest.mark.parametrize("case", GATED, ids=lambda case: case.name)
def test_gate_lets_those_pass_that_are_right(case: Case) -> None:
    inputs = case.inputs(3, CPU)
    true = providers.truth(case, providers.definition_of(case), inputs)
    for name, provider in providers.providers(case, CPU, ["eager", "cdist", "bmm", "aten"]):
        assert provider.losses is not None, name
        found = providers.errors(providers.evaluate(case, provider.losses, inputs), true)
        assert providers.wrong(found, providers.BOUNDS[case.products]) is None, name


def test_gate_refuses_matches_that_are_not_the_nearest() -> None:
    case = Matching("highest", B=3, patches=(70, 50), C=64, matches=20)
    inputs = case.inputs(3, CPU)
    true = providers.truth(case, providers.DROP_IN, inputs)

    def another(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        found = providers.eager_of(case, providers.DROP_IN)(x, y)
        candidate = found["candidate"].clone()
        candidate[1, 7] = (candidate[1, 7] + 1) % 50
        return {**found, "candidate": candidate}

    found = providers.errors(providers.evaluate(case, another, inputs), true)
    assert "chosen" in str(providers.wrong(found, providers.BOUNDS["bf16"]))


def test_the_guide_s_shape_and_provider_work() -> None:
    guide = (machine.ROOT / "docs" / "benchmarks.md").read_text()
    shape, provider = (
        guide.partition(f"## Add a {what}")[2].partition("```py\n")[2].partition("```")[0]
        for what in ("shape", "provider")
    )
    added = eval(shape, vars(cases))
    assert isinstance(added, Case), "an element that is put among others, not a tuple of its own"
    assert added.name == "vicregl-32x256x1024-m20-bf16"

    def my_loss(x: Tensor, y: Tensor) -> Tensor:
        return providers.eager(x, y)["loss"]

    views, maps = VICReg("highest", N=8, D=4), GATED[-1]
    for case, there in ((views, True), (maps, False)):
        makers: dict[str, Any] = {}
        exec(provider, {**vars(providers), "my_loss": my_loss, "case": case, "makers": makers})
        assert ("mine" in makers) == there
        if there:
            inputs = case.inputs(0, CPU)
            true = providers.truth(case, providers.DROP_IN, inputs)
            found = providers.errors(providers.evaluate(case, makers["mine"]().losses, inputs), true)
            assert providers.wrong(found, providers.BOUNDS["highest"]) is None


def test_inputs_have_matches_that_are_told_apart() -> None:
    case = Local("highest", B=4, patches=(49, 49), C=512, matches=(20, 20))
    x, y, *_ = case.inputs(0, CPU)
    d = reference.distances(x.detach().double(), y.detach().double()).min(-1).values.sort(-1).values
    assert ((d[:, 20] - d[:, 19]) / d[:, 19]).min() > 1e-4  # the last that is chosen, and the first that is not


def test_torch_multiplies_in_the_shape_s_precision_and_is_left_as_it_was() -> None:
    matmul, device = torch.backends.cuda.matmul, torch.device("cuda")
    before = matmul.fp32_precision
    for precision, setting in (("high", "tf32"), ("highest", "ieee"), (None, "ieee")):
        with providers.products_of(precision, device):
            assert matmul.fp32_precision == setting
            # What Inductor reads: it raises where only the newer of torch's two interfaces was used.
            assert torch.get_float32_matmul_precision() == ("high" if setting == "tf32" else "highest")
        assert matmul.fp32_precision == before
