"""The parts of benchmarks/first_card.py: their commands, times and shapes, and what they need of a machine."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import checkout, first_card, kernel_results
from benchmarks.__main__ import _parser
from benchmarks.cases import CASES, require_gpu_shapes
from benchmarks.first_card import MINUTES, PARTS, Part
from benchmarks.shapes import KERNEL_SHAPES, PROOF_SHAPES
from benchmarks.steps import GRACE, Step

ROOT = Path(__file__).resolve().parent.parent
each_part = pytest.mark.parametrize("part", PARTS)


def groups_of(part: str, rehearse: bool = False) -> list[list[Step]]:
    groups: list[list[Step]] = getattr(Part(Path("/out"), rehearse), part)()
    return groups


def steps_of(part: str, rehearse: bool = False) -> list[Step]:
    return [step for group in groups_of(part, rehearse) for step in group]


# -- the plan -----------------------------------------------------------------------------------------------------


@each_part
def test_every_step_can_have_its_least_time(part: str) -> None:
    groups = groups_of(part)
    least = sum(max(step.least for step in group) for group in groups)
    assert least <= 60 * MINUTES - 2 * GRACE - 10
    assert all(step.least < step.limit for group in groups for step in group)


@each_part
def test_names_of_steps_are_unique(part: str) -> None:
    names = [step.name for step in steps_of(part)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("rehearse", [False, True], ids=["on a card", "rehearsed"])
@each_part
def test_every_command_of_the_benchmarks_takes_its_arguments(part: str, rehearse: bool) -> None:
    checked = 0
    for step in steps_of(part, rehearse):
        words = [word.replace("{minutes}", "1") for word in step.command]
        if words[1:3] == ["-m", "benchmarks"]:
            _parser()[0].parse_args(words[3:])
            checked += 1
    assert checked >= 2


def test_the_proof_has_all_shapes_with_a_target_and_fifteen_more() -> None:
    on_gpu = {case.name: case.targets["cuda"] for case in CASES if case.targets.get("cuda")}
    assert {name for name, goals in on_gpu.items() if "floor" in goals} >= set(KERNEL_SHAPES)
    assert set(KERNEL_SHAPES) | on_gpu.keys() <= set(PROOF_SHAPES)
    assert len(PROOF_SHAPES) == len(set(PROOF_SHAPES)) == len(on_gpu) + 15
    require_gpu_shapes(PROOF_SHAPES)


def test_the_tests_of_a_card_are_all_that_have_its_marker() -> None:
    files = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    marked = {
        name for name, text in files.items() if re.search(r"^[^\"#]*pytest\.mark\.gpu\b", text, re.MULTILINE)
    }
    (step,) = [step for step in steps_of("correctness") if step.name == "tests"]
    assert {Path(word).name for word in step.command if word.endswith(".py")} == marked
    assert len(marked) >= 4


def decorated(needle: str) -> dict[str, bool]:
    """By name the tests of a GPU whose body has the text, and whether one of their marks is ``alone`` or ``sanitizer``."""
    found = {}
    for path in (ROOT / "tests").glob("test_gpu_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [ast.unparse(decorator) for decorator in node.decorator_list]
                body = "\n".join(map(ast.unparse, node.body))
                is_marked = {"pytest.mark.alone", "pytest.mark.sanitizer"} & set(marks)
                if needle in body or is_marked:
                    found[node.name] = bool(is_marked)
    return found


def test_what_needs_the_whole_card_or_minutes_runs_by_itself() -> None:
    alone, sanitizer = decorated("needs_free("), decorated("'compute-sanitizer'")
    assert len(alone) == len(sanitizer) == 3
    assert all(alone.values())
    assert all(sanitizer.values())
    selections = [
        step.command[step.command.index("-m", 3) + 1]
        for step in steps_of("correctness")
        if "tests" in step.name
    ]
    assert selections == ["gpu and not alone and not sanitizer", "gpu and alone", "gpu and sanitizer"]


def test_the_words_that_choose_tests_are_in_their_names() -> None:
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("test_gpu_*.py"))
    names = re.findall(r"def (test_\w+)", text)
    for word in first_card.PARITY_AND_GRAPHS.split(" or "):
        assert any(word in name for name in names), word
    (sanitizer,) = [step for step in steps_of("correctness") if step.name == "tests-sanitizer"]
    assert sanitizer.command[sanitizer.command.index("-k") + 1] == first_card.SANITIZED
    for word in first_card.SANITIZED.split(" and "):
        assert f'"{word}"' in text  # a value of a parameter


@each_part
def test_a_card_is_asked_for_by_name(part: str) -> None:
    """Without a name the benchmarks would take the CPU where there is no GPU."""
    for step in steps_of(part):
        words = [*step.command]
        if words[2] == "vicreg_fast" or (words[2] == "benchmarks" and words[3] not in ("estimate", "tune")):
            assert words[words.index("--device") + 1] == "cuda", step.name


@each_part
def test_a_rehearsal_selects_no_test_of_a_gpu_and_makes_its_times_up(part: str) -> None:
    commands = [" ".join(step.command) for step in steps_of(part, rehearse=True)]
    assert not any("test_gpu" in command for command in commands)
    assert all("--made-up" in command for command in commands if "benchmarks kernels" in command)


# -- what it needs ------------------------------------------------------------------------------------------------


def test_it_needs_no_torch_of_its_own(tmp_path: Path) -> None:
    """Run as a file, from another folder, with a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('broken')")
    command = [sys.executable, str(ROOT / "benchmarks" / "first_card.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "correctness,tuning,proof" in done.stdout


@pytest.mark.parametrize("place", ["with another part", "in the checkout", "below a file"])
def test_an_unusable_folder_is_refused(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "steps.jsonl"
    file.touch()
    folder = {"with another part": tmp_path, "in the checkout": ROOT / "card", "below a file": file / "out"}[
        place
    ]
    with pytest.raises(SystemExit) as stopped:
        first_card.main(["--part", "proof", "--out", str(folder)])
    assert stopped.value.code == 2
    assert str(folder) in capsys.readouterr().err
    assert not (ROOT / "card").exists()


def test_a_page_that_cannot_be_made_ends_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise KeyError("microseconds")

    steps = [[Step(name, ("true",), 9, 0)] for name in ("first", "second")]
    monkeypatch.setattr(Part, "proof", lambda self: steps)
    monkeypatch.setattr(first_card.card_page, "write", broken)
    monkeypatch.setattr(first_card.signal, "signal", lambda *arguments: None)
    assert first_card.main(["--part", "proof", "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == ["first", "second"]
    assert "KeyError: 'microseconds'" in capsys.readouterr().out


def test_the_view_of_a_checkout_has_the_kernels_in_the_package(tmp_path: Path) -> None:
    """Of a checkout in which nothing is installed or linked."""
    for name in (
        "kernels/__init__.py",
        "kernels/views.py",
        "vicreg_fast/__init__.py",
        "benchmarks/__init__.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    before = sorted(tmp_path.rglob("*"))
    code = "import vicreg_fast.kernels.views as v, benchmarks as b; print(v.__file__, b.__file__, sep='|')"
    with checkout.importable(tmp_path) as view:
        done = subprocess.run(
            [sys.executable, "-B", "-c", code], cwd=view, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        kernels, benchmarks = map(Path, done.stdout.strip().split("|"))
        assert kernels == view / "vicreg_fast" / "kernels" / "views.py"
        assert kernels.resolve() == (tmp_path / "kernels" / "views.py").resolve()
        assert benchmarks.is_relative_to(view)
    assert not view.exists()
    assert sorted(tmp_path.rglob("*")) == before


MISSING = ("pandas", "tabulate", "jsonschema", "tqdm")
KERNELS = """
import sys
import benchmarks.run, benchmarks.machine, benchmarks.profiles
from benchmarks.__main__ import main
assert not set(sys.modules) & {"pandas", "tabulate", "jsonschema", "tqdm"}
sys.exit(main(["kernels", "--device", "cpu", "--made-up", "--shape", "64x64-high", "--json", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A rehearsed file of kernels' times, and what was printed, where the packages of reports are missing."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("kernels")
    for name in MISSING:
        (folder / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    path = folder / "kernels.json"
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, str(path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


def test_kernels_are_timed_where_the_packages_of_reports_are_missing(made_up: tuple[Path, str]) -> None:
    document = kernel_results.load(made_up[0])
    (shape,) = document["shapes"]
    names = [kernel["kernel"] for kernel in shape["kernels"]]
    assert names == ["narrow_second_moment_forward", "splitk_reduction", "narrow_gradient"]
    assert shape["microseconds"] == sum(kernel["microseconds"]["median"] for kernel in shape["kernels"])
    assert document["complete"]
    assert {"driver", "sm_clock_mhz"} <= document["clocks"].keys()
    assert {"device", "torch", "triton"} <= document["machine"].keys()


def test_made_up_times_say_so_in_the_file_and_in_the_output(made_up: tuple[Path, str]) -> None:
    path, output = made_up
    assert "none was timed" in json.loads(path.read_text())["fixture"]
    assert "NOT MEASURED" in output
