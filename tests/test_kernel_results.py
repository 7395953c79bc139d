"""Files of kernels' times: what is refused, how kernels are paired, and how one process a shape is watched."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_results, kernel_run
from benchmarks.__main__ import main
from benchmarks.kernel_results import Pair
from benchmarks.results import UsageError

Capture = pytest.CaptureFixture[str]


def kernel(name: str, median: float) -> dict[str, Any]:
    quantiles = {"q20": median - 1, "median": median, "q80": median + 1}
    return {"kernel": name, "programs": 1, "rounds": 9, "microseconds": quantiles}


def document() -> dict[str, Any]:
    shape = {
        "shape": "64x64-high",
        "status": "timed",
        "reason": None,
        "microseconds": 7.0,
        "kernels": [kernel("a", 7.0)],
    }
    keys = dict.fromkeys(("date", "machine", "clocks", "commit", "ceilings", "asked", "complete"))
    return {"schema": kernel_results.SCHEMA, "version": kernel_results.VERSION, **keys, "shapes": [shape]}


def without(where: str, key: str) -> dict[str, Any]:
    changed = document()
    shape = changed["shapes"][0]
    places = {"file": changed, "shape": shape, "kernel": shape["kernels"][0]}
    places["quantiles"] = places["kernel"]["microseconds"]
    del places[where][key]
    return changed


REFUSED = {
    "no JSON": ("{", "not complete JSON"),
    "a result of run": (
        json.dumps({"schema": "vicreg_fast.benchmark", "version": 3}),
        "['vicreg_fast.benchmark', 3]",
    ),
    "another version": (json.dumps(document() | {"version": 99}), "99]; only ['vicreg_fast.kernels', 1]"),
    "no machine": (json.dumps(without("file", "machine")), "at $: needs the keys machine"),
    "no status": (json.dumps(without("shape", "status")), "at $.shapes[0]: needs the keys status"),
    "no programs": (
        json.dumps(without("kernel", "programs")),
        "at $.shapes[0].kernels[0]: needs the keys programs",
    ),
    "no median": (json.dumps(without("quantiles", "median")), "kernels[0].microseconds: needs the keys median"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unusable_file_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    text, reason = REFUSED[case]
    path = tmp_path / "kernels.json"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        kernel_results.load(path)
    assert reason in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(document()))
    assert kernel_results.load(path) == document()
    with pytest.raises(UsageError, match="cannot read"):
        kernel_results.load(tmp_path / "none.json")


def test_kernels_are_paired_by_name_and_order() -> None:
    times = {"gram": 2.0, "sum": 3.0, "gradient": 4.0}
    estimated = {
        "microseconds": 13.0,
        "kernels": [{"kernel": name, "microseconds": t} for name, t in times.items()],
    }
    estimated["kernels"].append({"kernel": "gradient", "microseconds": 5.0})  # type: ignore[attr-defined]
    launched = [kernel("gram", 4.0), kernel("gradient", 8.0), kernel("gradient", 15.0), kernel("scatter", 1.0)]
    measured = {"microseconds": 28.0, "kernels": launched}
    pairs = kernel_results.beside(estimated, measured)
    assert pairs == [
        Pair("gram", 2.0, 4.0),
        Pair("sum", 3.0, None),
        Pair("gradient", 4.0, 8.0),
        Pair("gradient", 5.0, 15.0),
        Pair("scatter", None, 1.0),
    ]
    assert [pair.ratio for pair in pairs] == [2.0, None, 2.0, 3.0, None]
    assert pairs[1].cells() == ["sum", "3.0", "–", "–"]
    assert kernel_results.sums(estimated, measured).cells() == ["sum", "13.0", "28.0", "2.15"]


def test_a_card_without_known_rates_is_refused() -> None:
    known = ("cuda:80", "cuda:90")
    for capability, target in {"9.0": "cuda:90", "8.0": "cuda:80", None: None}.items():
        assert kernel_results.target_of({"machine": {"capability": capability}}, known) == target
    with pytest.raises(
        UsageError, match=r"no rates of compute capability 7\.5; --target needs one of cuda:80, cuda:90"
    ):
        kernel_results.target_of({"machine": {"capability": "7.5"}}, known)


# -- one process a shape ------------------------------------------------------------------------------------------


def test_the_end_of_a_shapes_process_is_its_reason() -> None:
    process = kernel_run._Process("64x64-high", "cpu", True)
    process.end()
    outcome = process.message(5.0, "compilation")
    record = kernel_run.shape_record("64x64-high", outcome)
    assert record["status"] == "error"
    assert record["reason"] == "the process ended during compilation with exit status -9"
    assert (record["kernels"], record["microseconds"]) == ([], None)


def test_a_process_that_takes_too_long_is_given_up() -> None:
    process = kernel_run._Process("64x64-high", "cpu", True)
    try:
        assert process.message(0.01, "compilation") == "compilation took more than 0 s"
        begin = time.monotonic() - 90
        assert process.message(75.0, "compilation", begin) == "compilation took more than 75 s"
    finally:
        process.end()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "8x16-highest"], ["'8x16-highest'", "256x8192-highest"]),
        (["--device", "cpu"], ["kernels are timed on a GPU", "got device cpu", "--made-up"]),
    ],
    ids=["a shape of a CPU", "a CPU"],
)
def test_bad_arguments_are_refused(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernels.json"
    with pytest.raises(SystemExit) as stopped:
        main(["kernels", "--json", str(path), *arguments])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert [word for word in words if word not in message] == []
    assert not path.exists()
