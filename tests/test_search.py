"""The search for configurations: what it tries, what it leaves out and why, and what decides."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vicreg_fast.backends import kernel_failures
from vicreg_fast.backends.triton import configs
from vicreg_fast.backends.triton.configs import Gradient, Key, Local, Moments, Product
from vicreg_fast.plan import Matches

search: Any = pytest.importorskip("vicreg_fast.backends.triton.search")
candidates: Any = pytest.importorskip("vicreg_fast.backends.triton.candidates")
launch_timing: Any = pytest.importorskip("vicreg_fast.backends.triton.launch_timing")

CPU = torch.device("cpu")


# -- candidates -----------------------------------------------------------------------------------------------------


def key_of(kernel: str, first: int, second: int, kind: str = "half") -> Key:
    return Key("sm90", 132, True, kernel, "" if kernel == "moments" else kind, 2, first, second)


@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("sizes", [(7, 8), (20, 49), (256, 8192), (6528, 512), (2_600_000, 64)], ids=str)
def test_candidates_are_of_the_tables_types_without_the_tables_own(kernel: str, sizes: tuple[int, int]) -> None:
    key = key_of(kernel, *sizes)
    found = candidates.candidates(key)
    assert len(found) == len(set(found)) >= 3
    assert {type(config) for config in found} == {configs.KERNELS[kernel].config}
    assert configs.from_table(key) not in found


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (key_of("gradient", 2048, 8192), Gradient(128, 256, 64, 8, 3)),
        (key_of("local", 20, 49), Local(64, 1)),
        (key_of("local", 20, 49, "fp32"), Local(64, 2)),
        (key_of("gram", 2048, 8192), Product(64, 64, 4, 3, 3)),
        (key_of("moments", 256, 8192), Moments(64, 32, 4, 3)),
        (key_of("moments", 300, 8192), Moments(256, 32, 8, 3)),
    ],
    ids=str,
)
def test_what_helped_is_in_the_table_or_tried(key: Key, expected: Any) -> None:
    assert expected in [configs.from_table(key), *candidates.candidates(key)]


def test_blocks_are_not_larger_than_what_they_cover() -> None:
    assert {config.block_m for config in candidates.candidates(key_of("gram", 40, 512))} == {32, 64}
    # One block of all rows has no loop: stages would change nothing.
    covering = [c for c in candidates.candidates(key_of("moments", 200, 512)) if c.block_n == 256]
    assert {config.stages for config in covering} == {2}


@pytest.mark.parametrize("kernel", ["gram", "gradient"])
def test_a_thread_has_neither_too_many_sums_nor_too_few(kernel: str) -> None:
    for config in candidates.candidates(key_of(kernel, 2048, 8192)):
        elements = config.block_m**2 if kernel == "gram" else config.block_n * config.block_d
        assert 8 <= elements / (32 * config.warps) <= 128


def test_candidates_nearest_to_the_table_come_first() -> None:
    key = key_of("gradient", 2048, 8192)
    table, (first, *_, last) = configs.from_table(key), candidates.candidates(key)
    assert sum(a != b for a, b in zip(first, table, strict=True)) == 1
    assert sum(a != b for a, b in zip(last, table, strict=True)) > 1


# -- a search without kernels ---------------------------------------------------------------------------------------

KEY = key_of("local", 20, 49)
TABLE = configs.from_table(KEY)
A, B, C = Local(16, 1), Local(32, 1), Local(256, 4)


class FakeKernel:
    """A kernel that is not launched; a function has its name."""

    def __init__(self, name: str) -> None:
        self.fn = SimpleNamespace(__name__=f"_{name}_kernel")


class FakePass:
    """A pass of two kernels, timed by a table in place of a device.

    The first kernel has the configuration's blocks; the second the same work in every pass but those of ``neighbours``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[Any, float]) -> None:
        self.seconds, self.results, self.errors = seconds, {}, {}
        self.neighbours: dict[Any, float] = {}
        self.spills: dict[Any, int] = {}
        self.host: dict[Any, float] = {}
        self.tried: list[Any] = []
        self.captured: list[str] = []
        self.captured_launches: list[Any] = []
        self.buffers: list[Tensor] = []  # one for each pass
        self.launches: list[Any] = []

        @contextmanager
        def recorded(every_thread: bool = False) -> Iterator[list[Any]]:
            self.launches = []
            yield self.launches

        monkeypatch.setattr(launch_timing, "recorded", recorded)

    def run(self) -> list[Tensor]:
        config = configs.choose(KEY)
        self.tried.append(config)
        if config in self.errors:
            raise self.errors[config]
        time.sleep(self.host.get(config, 0.0))
        compiled = SimpleNamespace(n_spills=self.spills.get(config, 0))
        work = {"config": config, "seconds": self.seconds.get(config, 9.0)}
        if self.buffers:
            work["buffer"] = self.buffers[len(self.tried) - 1]
        self.launches.append(launch_timing.Launch(FakeKernel("own"), (1,), work, compiled))
        other = {"seconds": self.neighbours.get(config, 1.0)}
        self.launches.append(launch_timing.Launch(FakeKernel("next"), (1,), other))
        return [self.results.get(config, torch.ones(100))]

    def capture(self, launch: Any) -> Callable[[], float]:
        self.captured.append(launch.name)
        self.captured_launches.append(launch)
        return lambda: float(launch.arguments["seconds"])

    def search(self, *tried: Any) -> list[Any]:
        effort = launch_timing.Effort(1, 1, 0.0)
        found: list[Any] = search.search(KEY, tried, self.run, self, CPU, effort=effort)
        return found


@pytest.fixture
def fake_pass(monkeypatch: pytest.MonkeyPatch) -> FakePass:
    monkeypatch.setattr(configs, "tuned_configs", {})
    return FakePass(monkeypatch, {TABLE: 5.0, A: 3.0, B: 4.0, C: 6.0})


def test_the_least_device_time_wins_whatever_the_host_takes(fake_pass: FakePass) -> None:
    # The fastest kernel has the slowest launcher: the time of the whole call would rank it last.
    fake_pass.host = {A: 0.05}
    trials = fake_pass.search(A, B, C)
    assert [trial.config for trial in trials] == [TABLE, A, B, C]
    assert [trial.time.median for trial in trials] == [6.0, 4.0, 5.0, 7.0]
    assert search.fastest(trials).config == A
    assert configs.tuned_configs == {}


def test_kernels_beside_count_where_a_configuration_changes_them(fake_pass: FakePass) -> None:
    fake_pass.neighbours = {A: 7.0}
    trials = fake_pass.search(A, B)
    assert [(name, time.median) for name, time in trials[1].kernels] == [("own", 3.0), ("next", 7.0)]
    assert search.fastest(trials).config == B
    # The neighbour's two kinds of work are timed once each.
    assert sorted(fake_pass.captured) == ["next", "next", "own", "own", "own"]


def test_the_table_stays_where_nothing_is_faster(fake_pass: FakePass) -> None:
    assert search.fastest(fake_pass.search(C)).config == TABLE


def test_the_table_stays_where_the_rounds_overlap() -> None:
    table = search.Trial(TABLE, launch_timing.Times(5.0, 4.8, 5.2))
    near = search.Trial(A, launch_timing.Times(4.7, 4.6, 4.9))
    apart = search.Trial(B, launch_timing.Times(4.7, 4.6, 4.75))
    assert search.fastest([table, near]) is table
    assert search.fastest([table, apart]) is apart


def test_candidates_are_timed_on_earlier_tensors_where_they_fit(fake_pass: FakePass) -> None:
    # Each candidate's own buffers would take the memory of as many steps.
    fake_pass.buffers = [torch.zeros(8), torch.zeros(8), torch.zeros(9), torch.zeros(9)]
    fake_pass.search(A, B, C)
    timed = [launch.arguments["buffer"] for launch in fake_pass.captured_launches if launch.name == "own"]
    assert [buffer.shape[0] for buffer in timed] == [8, 8, 9, 9]
    assert timed[1] is timed[0]
    assert timed[3] is timed[2]


def compilation_error() -> Exception:
    import ast

    from triton.compiler.errors import CompilationError

    return CompilationError("x", ast.parse("x"), "no")


def out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300_000, 232_448, "shared memory")


@pytest.mark.parametrize(
    "error",
    [
        out_of_resources,
        compilation_error,
        lambda: RuntimeError("PassManager::run failed"),
        torch.OutOfMemoryError,
    ],
    ids=["resources", "compiler", "passes", "memory"],
)
def test_what_does_not_fit_is_left_out_with_its_reason(
    error: Callable[[], Exception], fake_pass: FakePass
) -> None:
    fake_pass.errors = {A: error()}
    trials = fake_pass.search(A, B)
    assert trials[1].time is None
    assert trials[1].reason.startswith(f"does not fit: {type(error()).__name__}")
    assert search.fastest(trials).config == B


@pytest.mark.parametrize("at_once", [True, False], ids=["raised by the launch", "seen later"])
def test_an_illegal_access_ends_the_search(
    at_once: bool, fake_pass: FakePass, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("an illegal memory access was encountered")
    if at_once:
        fake_pass.errors = {A: error}
    alive = torch.zeros

    def zeros(*arguments: Any, **options: Any) -> Tensor:
        """After A's launch the device runs nothing."""
        if A in fake_pass.tried:
            raise error
        return alive(*arguments, **options)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(search.DeviceError, match=r"no longer runs a trivial kernel: an illegal memory access"):
        fake_pass.search(A, B)
    assert fake_pass.tried == [TABLE, A]
    assert configs.tuned_configs == {}


def test_a_failed_device_is_no_reason_for_another_backend(
    fake_pass: FakePass, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(search.DeviceError) as caught:
        fake_pass.search(A)
    assert not kernel_failures.caused_by_kernels(caught.value)


def test_any_other_error_is_raised(fake_pass: FakePass) -> None:
    fake_pass.errors = {A: RuntimeError("a mistake of the launcher")}
    with pytest.raises(RuntimeError, match="a mistake of the launcher"):
        fake_pass.search(A, B)


def test_the_tables_own_configuration_must_fit(fake_pass: FakePass) -> None:
    fake_pass.errors = {TABLE: out_of_resources()}
    with pytest.raises(Exception, match="out of resource"):
        fake_pass.search(A)


@pytest.mark.parametrize("value", [1.01, math.nan, 0.0], ids=str)
def test_wrong_results_are_not_timed(value: float, fake_pass: FakePass) -> None:
    fake_pass.results = {A: torch.full((100,), value), B: torch.full((100,), 1 + 1e-5)}
    trials = fake_pass.search(A, B)
    assert trials[1].time is None
    assert trials[1].reason.startswith("wrong: ")
    assert "1e-03 allowed" in trials[1].reason
    assert trials[2].time is not None


def test_one_unwritten_tile_of_eighty_thousand_is_wrong(fake_pass: FakePass) -> None:
    whole = torch.randn(81_250 * 8)
    damaged = whole.clone()
    damaged[:8] = 0
    fake_pass.results = {TABLE: whole, A: damaged}
    assert fake_pass.search(A)[1].reason.startswith("wrong: ")


def test_what_spills_is_not_timed(fake_pass: FakePass) -> None:
    fake_pass.spills = {A: 12}
    assert fake_pass.search(A, B)[1].reason == "own spills 12 registers"


def test_the_caller_learns_what_comes_next(fake_pass: FakePass) -> None:
    # Whoever runs the search in another process can tell which configuration ended it.
    announced: list[Any] = []
    effort = launch_timing.Effort(1, 1, 0.0)
    search.search(KEY, [A], fake_pass.run, fake_pass, CPU, effort=effort, before_each=announced.append)
    assert announced[:2] == [TABLE, A]  # run
    assert announced[2:5] == [TABLE, TABLE, A]  # captured: two kernels of the first pass, one of the second
    assert announced[5:] == [TABLE, TABLE, A, TABLE, A, TABLE]  # two rounds


# -- matches --------------------------------------------------------------------------------------------------------


def test_equally_near_matches_may_differ_and_others_may_not(interpreted: None) -> None:
    from vicreg_fast.backends.triton.launch_matching import squared_distances

    # Patch k of x is nearest to patch k of y; patches 2 and 3 of both maps are the same.
    x = torch.tensor([0.0, 2.0, 5.0, 5.0]).view(1, 4, 1).expand(1, 4, 4)
    y = x + 0.25
    expected = squared_distances([x, y], [], [2], False, index([2, 3], [2, 3]))
    assert expected[0].tolist() == [[0.25, 0.25]]
    assert search.difference(squared_distances([x, y], [], [2], False, index([3, 2], [2, 3])), expected) == 0
    assert search.difference(squared_distances([x, y], [], [2], False, index([2, 3], [2, 1])), expected) > 1
    # An index out of bounds is a wrong one.
    assert search.difference(squared_distances([x, y], [], [2], False, index([0, 3], [99, 3])), expected) > 1


def index(queries: list[int], candidate_patches: list[int]) -> Matches:
    return Matches(torch.tensor([*queries, *candidate_patches]))


@pytest.mark.parametrize("counts", [(3, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("per_slot", [False, True])
def test_matched_distances_are_the_smallest(counts: tuple[int, int], per_slot: bool, interpreted: None) -> None:
    from vicreg_fast.backends import triton_backend
    from vicreg_fast.backends.triton.launch_matching import squared_distances

    maps, locations = [torch.randn(2, P, 8) for P in (6, 5)], [torch.rand(2, P, 2) for P in (6, 5)]
    matches = triton_backend.match(maps, locations, counts, "distance", per_slot)
    actual = squared_distances(maps, locations, counts, per_slot, matches)
    expected = [
        torch.cdist(a.double(), b.double()).square().min(-1).values.sort(-1).values[:, :m]
        for first, second in (locations, maps)
        for a, b, m in ((first, second, counts[0]), (second, first, counts[1]))
    ]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
