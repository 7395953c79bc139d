"""Fixtures of every test: fixed seeds, new memory filled with NaN, and whether Triton is interpreted."""

import contextlib
import faulthandler
import importlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --test-seconds."""
    words = (
        "end the process of a test that takes longer, with its traceback: nothing else ends a kernel that hangs"
    )
    parser.addoption("--test-seconds", type=float, default=0.0, metavar="S", help=words)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Watch the test from a thread that needs no lock of Python's.  xdist reports a test whose process has ended as failed."""
    seconds = item.config.getoption("test_seconds", 0.0)
    if not seconds:
        return (yield)
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


STDERR = pytest.StashKey[int]()  # the file descriptor of the process's own stderr


def selects_gpu(expression: str) -> bool:
    """Whether a marker expression (``-m``) asks for the tests that need a GPU."""
    return re.search(r"\bgpu\b", re.sub(r"\bnot\s+(gpu\b|\([^()]*\))", "", expression)) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Set up Triton before any test is imported: its own functions are built for the interpreter, or not, at import."""
    config.stash[STDERR] = os.dup(2)  # as it is now: while a test runs, pytest captures it
    if selects_gpu(config.option.markexpr):
        # What torch and Triton warn of differs by their versions and by the card.
        config.addinivalue_line("filterwarnings", "default")
        # With this warning the other backend takes the place of the kernels.
        config.addinivalue_line("filterwarnings", "error:the Triton kernels cannot run")
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"-m gpu needs a CUDA or ROCm device; torch {torch.__version__} sees none")
        os.environ.pop("TRITON_INTERPRET", None)
        # Without it, deterministic algorithms (poisoned_memory) refuse cuBLAS, which computes the reference.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return
    # Tests of the kernels set the variable again (the fixture interpreted); for all other tests this is a machine
    # without a GPU.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        from triton.runtime import interpreter

        patch_language_once_a_launch(interpreter)
    del os.environ["TRITON_INTERPRET"]


def patch_language_once_a_launch(interpreter: Any) -> None:
    """Let the interpreter replace the functions of triton.language once a launch instead of at each device function's call.

    The replacement took half of the interpreter's time.  It is needed once for each module that holds kernels, and stays in
    place until the launch ends.
    """
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: dict[int, Any] = {}

    def replace_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in replaced:
            replaced[module] = replace(function)
        return replaced[module]

    def clear_and_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, clear_and_launch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` is filled with NaN, so that an unwritten element shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """One thread: small tensors gain nothing from more, and on a busy machine waiting for a thread costs ten times the work."""
    torch.set_num_threads(1)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """A GPU with compiled kernels, and eager float32 products, which fixes the meaning of ``precision=None``."""
    if not selects_gpu(request.config.option.markexpr):
        pytest.skip("needs pytest -m gpu: in this run Triton is an interpreter")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.fixture
def clean_memory(poisoned_memory: None) -> None:
    """New memory is not filled: filling takes a kernel, and would hide values that one launch leaves to the next."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in the interpreter; their first import decides whether they do."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.import_module("vicreg_fast.backends.triton_backend")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The backend that a test is parametrised with (``indirect``); "triton" runs in the interpreter."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
    return str(request.param)


class Launch(NamedTuple):
    """A launch in the interpreter: the kernel's name and its arguments by name."""

    name: str
    arguments: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments and within NamedTuples."""
        return list(_tensors(self.arguments.values()))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


Launches = list[Launch]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Every launch in the interpreter, in order."""
    launched: Launches = []
    kind = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    run = kind.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert not args, "kernels are launched with keywords"
        launched.append(Launch(self.fn.__name__.strip("_").replace("_kernel", ""), kwargs))
        return run(self, **kwargs)

    monkeypatch.setattr(kind, "run", recorded)
    return launched


@pytest.fixture(scope="session")
def rank_results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """For each number of ranks, the function that reads a scenario's results; all ranks run once a session."""
    from .distributed_ranks import WORLDS, run_ranks

    return {world: run_ranks(world, tmp_path_factory.mktemp(f"ranks{world}")) for world in WORLDS}
