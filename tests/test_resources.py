"""The kernels compile for GPUs that are not here: no spill, within shared memory, on tensor cores, 64-bit offsets."""

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


# Some thirty variants, in half a minute for each of three targets.
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_one_variant_in_fifteen_compiles_without_a_defect(target: str) -> None:
    done = resources("--target", target, "--every", "15")
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

for target in resources.SHARED_MEMORY:
    seen = set()
    for variant in resources.variants(target):
        blocks = [value for name, value in variant.constants.items() if name.startswith("BLOCK")]
        warps, stages = variant.options["num_warps"], variant.options.get("num_stages", 0)
        seen.add((variant.kernel.__name__.split("_")[-3], *blocks, warps, stages))
    for table in configs.FAMILIES[resources.machine(target).family]:
        rows = [("moments", row.config) for row in table.moments]
        rows += [("gram", row.config) for kind in table.gram.values() for row in kind]
        rows += [("moment", row.config) for kind in table.second_moment.values() for row in kind]
        for kernel, config in rows:
            blocks = config[:2] + config[2:4]
            assert (kernel, *blocks) in seen, (target, kernel, config)
        for kind in table.gradient.values():
            for row in kind:
                assert ("", *row.config) in seen, (target, row)
"""


def test_every_row_of_the_tables_is_compiled() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", COVERED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr


def test_an_unknown_target_lists_the_known_ones() -> None:
    done = resources("--target", "cuda:70")
    assert done.returncode == 2
    for target in TARGETS:
        assert target in done.stderr
