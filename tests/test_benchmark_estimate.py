"""The estimate of a step on a GPU that is not there, and what it is counted from.

The kernels are compiled in processes of their own: in this one Triton is an interpreter.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

KEYS = {"shape", "target", "triton", "microseconds", "floor_microseconds", "share", "kernels"}
KERNEL_KEYS = {
    "kernel", "programs", "registers", "spill_bytes", "shared_bytes", "programs_per_sm", "waves", "narrowest_load_bytes",
    "async_copies", "warp_instructions", "operations", "bytes", "microseconds",
}  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process with Triton's compiler."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


SHAPE = "2600000x64-bf16"
KERNELS = ["narrow_second_moment_forward", "splitk_reduction", "narrow_gradient"]
# Half of the table's rate of a copy, and another number of SMs.
CEILINGS = {
    "copy_bytes_per_s": 2.15e12,
    "operations_per_s": {"bf16": 790e12, "high": 395e12, "highest": 132e12},
}


def kernels_file(folder: Path) -> Path:
    """A file of kernels' times that was written by hand: 100 us each, and one launch that the estimate has not."""
    quantiles = {"q20": 99.0, "median": 100.0, "q80": 101.0}
    kernels = [
        {"kernel": name, "programs": 1, "rounds": 9, "microseconds": quantiles}
        for name in [*KERNELS, "scatter"]
    ]
    shape = {"shape": SHAPE, "status": "timed", "reason": None, "microseconds": 400.0, "kernels": kernels}
    document = {
        "schema": "vicreg_fast.kernels",
        "version": 1,
        "fixture": "written by hand",
        **dict.fromkeys(("date", "clocks", "commit")),
        "machine": {"device": "NVIDIA Fake", "multiprocessors": 120, "capability": "9.0"},
        "ceilings": CEILINGS,
        "asked": [SHAPE],
        "complete": True,
        "shapes": [shape],
    }
    path = folder / "kernels.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def estimated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The estimate of a shape beside a file of kernels' times, which chooses the shape, and what was printed."""
    folder = tmp_path_factory.mktemp("estimate")
    path = folder / "estimate.json"
    done = run("-m", "benchmarks", "estimate", "--json", str(path), "--against", str(kernels_file(folder)))
    assert done.returncode == 0, done.stderr
    (shape,) = json.loads(path.read_text())["shapes"]
    return shape, done.stdout


def test_every_kernel_of_a_step_is_estimated(estimated: tuple[dict[str, Any], str]) -> None:
    shape, output = estimated
    assert "nothing is measured" in output
    assert set(shape) >= KEYS
    assert [kernel["kernel"] for kernel in shape["kernels"]] == KERNELS
    assert all(set(kernel) >= KERNEL_KEYS for kernel in shape["kernels"])
    assert shape["share"] == pytest.approx(shape["floor_microseconds"] / shape["microseconds"])
    assert shape["microseconds"] == pytest.approx(sum(kernel["microseconds"] for kernel in shape["kernels"]))
    forward, _, backward = shape["kernels"]
    # x, y and both gradients in bfloat16; beside them moments and M.
    assert backward["bytes"] == pytest.approx(4 * 2_600_000 * 64 * 2, rel=1e-3)
    # A matmul of 64 features for each element of both views, in whole tiles of rows.
    assert backward["operations"] == pytest.approx(2 * 2 * 2_600_000 * 64 * 64, rel=0.02)
    assert forward["operations"] == pytest.approx(2 * 2 * 2_600_000 * 64 * 64, rel=0.02)
    # Aligned data: 16 bytes a thread, copied asynchronously, by more than one instruction an element and fewer than 100.
    assert backward["narrowest_load_bytes"] == 16
    assert backward["async_copies"] > 0
    assert 1 < 32 * backward["warp_instructions"] / (2 * 2_600_000 * 64) < 100


def test_every_kernel_stands_beside_its_measured_time(estimated: tuple[dict[str, Any], str]) -> None:
    shape, output = estimated
    assert "was not measured: written by hand" in output
    times = {kernel["kernel"]: kernel["microseconds"] for kernel in shape["kernels"]}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()]
    for name, time in times.items():
        assert [name, f"{time:.1f}", "100.0", f"{100 / time:.2f}"] in rows
    assert ["scatter", "–", "100.0", "–"] in rows
    total = shape["microseconds"]
    assert ["sum", f"{total:.1f}", "400.0", f"{400 / total:.2f}"] in rows
    assert f"measured 400 µs, {400 / total:.2f} of the estimate" in output


def test_a_measured_cards_rates_take_the_place_of_the_tables(estimated: tuple[dict[str, Any], str]) -> None:
    shape, output = estimated
    assert "cuda:90, NVIDIA Fake (rates measured there" in output
    assert shape["kernels"][0]["programs"] == 120  # one for each of its SMs
    # Six passes over the elements at the measured rate of a copy.
    assert shape["floor_microseconds"] == pytest.approx(6 * 2_600_000 * 64 * 2 / 2.15e6, rel=1e-3)


def test_a_shape_of_a_cpu_is_refused() -> None:
    done = run("-m", "benchmarks", "estimate", "--shape", "8x16-highest")
    assert done.returncode == 2
    assert "8x16-highest" in done.stderr
    assert "256x8192-highest" in done.stderr


INTERRUPTED = """
import signal, time
from benchmarks import resources

try:
    with resources.compilers() as pool:
        waiting = [pool.submit(time.sleep, 60) for _ in range(100)]
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        waiting[0].result()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_the_compilers_at_once() -> None:
    done = run("-c", INTERRUPTED)  # which has work for an hour
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


def test_every_loop_of_the_kernels_has_a_number_of_steps() -> None:
    code = "from benchmarks import instructions as i; print(sorted(set(i.source_loops().values())));"
    code += "print({name: len(loops) for name, loops in i.LOOPS.items()}); print(i.RARE)"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    loops, steps, rare = map(ast.literal_eval, done.stdout.splitlines())
    in_source = {function: index + 1 for function, index in loops if function not in rare}
    assert steps == in_source


# A loop that divides approximately and loads a tile without a copy: of contiguous elements, and of every second one.
KERNEL = """
import sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks import defects, disassembly

@triton.jit
def copy(x, y, N, STEP: tl.constexpr):
    row = tl.arange(0, 32)[:, None]
    column = tl.arange(0, 64)[None, :]
    out = tl.zeros((32, 64), tl.float32)
    for start in range(0, N, 64):
        out += tl.load(x + row * N + (start + column) * STEP).to(tl.float32)
    tl.store(y + row * 64 + column, out / 3.0)

for step in (1, 2):
    signature = {"x": "*bf16", "y": "*fp32", "N": "i32", "STEP": "constexpr"}
    attributes = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]], (2,): [["tt.divisibility", 16]]}
    source = ASTSource(copy, signature, {(3,): step}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    code = disassembly.disassembled(compiled)
    tiles = disassembly.tiles(compiled.asm["ttgir"], 128)
    print([d.partition(" at ")[0] for d in defects.defects("copy", "cuda:90", compiled, code, tiles, True)])
"""


def test_narrow_loads_waiting_loops_and_approximate_divisions_are_defects(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KERNEL)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    wide, narrow = map(ast.literal_eval, done.stdout.splitlines())
    assert wide == ["no asynchronous copy", "approximate division or root"]
    assert narrow == ["2 bytes a thread", "no asynchronous copy", "approximate division or root"]
