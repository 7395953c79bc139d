"""The kernels compile for GPUs that are not present: no spill, within shared memory, on tensor cores, 64-bit offsets."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
TARGETS = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")


def resources(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: in this one Triton is an interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "resources", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


# Some forty variants, in half a minute for each of three targets.
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_one_variant_in_thirty_compiles_without_a_defect(target: str) -> None:
    done = resources("--target", target, "--every", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^[34]\d variants, 0 defects on {target}$", done.stdout, re.MULTILINE)
    assert len(done.stdout.splitlines()) >= 32


@pytest.mark.compile_all
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_without_a_defect(target: str) -> None:
    done = resources("--target", target)
    assert done.returncode == 0, done.stdout + done.stderr


COVERED = """
from benchmarks import resources
from vicreg_fast.backends.triton import configs

# The block sizes that a configuration sets; a square tile of distances sets both of its sides.
BLOCKS = {
    "moments_forward": ("BLOCK_N", "BLOCK_D"),
    "gram_forward": ("BLOCK_M", "BLOCK_K"),
    "second_moment_forward": ("BLOCK_M", "BLOCK_K"),
    "gradient": ("BLOCK_N", "BLOCK_D", "BLOCK_K"),
    "narrow_gradient": ("BLOCK_N",),
    "match_forward": ("BLOCK_Q", "BLOCK_K"),
    "vicregl_forward": ("BLOCK_D",),
    "vicregl_gradient": ("BLOCK_L", "BLOCK_D"),
}
FIELDS = {"match_forward": "matching", "vicregl_forward": "local", "vicregl_gradient": "local_gradient"}

for target in resources.SHARED_MEMORY:
    seen = set()
    for variant in resources.variants(target):
        name = variant.kernel.__name__.strip("_").removesuffix("_kernel").replace("narrow_second", "second")
        blocks = [variant.named_constants[block] for block in BLOCKS.get(name, ())]
        seen.add((name, *blocks, variant.options["num_warps"], variant.options["num_stages"]))
    tables = configs.ARCHITECTURES[resources.device_of(target).arch]
    for table in tables:
        for name, blocks in BLOCKS.items():
            rows = getattr(table, FIELDS.get(name, name.removesuffix("_forward")))
            kinds = rows.values() if isinstance(rows, dict) else [rows]
            for config in (row.config for kind in kinds for row in kind):
                key = (name, *config[: len(blocks)], config.warps, getattr(config, "stages", 1))
                assert key in seen, (target, key)
"""


def test_every_row_of_the_tables_is_compiled() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", COVERED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr


FAR_FEATURES = """
import contextlib
import torch
from benchmarks import resources
from benchmarks.variant import compile_for, variant_of
from vicreg_fast.backends import triton_backend
from vicreg_fast.plan import TWO_VIEWS

made = {}
def record(kernel, *, grid, warmup, **keywords):
    variant = variant_of(kernel, keywords)
    made[variant.key()] = variant

for N, D in ((4096, 32), (4096, 256), (16, 512)):
    with contextlib.ExitStack() as stack:
        for context in resources.as_if_on("cuda:90", record):
            stack.enter_context(context)
        x = torch.empty(1, N, D, device="cuda")
        y = torch.empty_strided((1, N, D), (1, 1, 2**31 + 16), device="cuda")
        results = triton_backend.terms(TWO_VIEWS, [x, y], None)
        triton_backend.gradient(TWO_VIEWS, [x, y], None, results[TWO_VIEWS.outputs :], results[:3], [True, True])
for variant in made.values():
    compile_for(variant, "cuda:90")
print(len(made))
"""


def test_features_of_one_view_lie_2_to_the_31_elements_apart() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", FAR_FEATURES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 8


def test_an_unknown_target_lists_the_known_ones() -> None:
    done = resources("--target", "cuda:70")
    assert done.returncode == 2
    for target in TARGETS:
        assert target in done.stderr
