"""Training steps as CUDA graphs.

A graph has fixed addresses.  One is captured for each set of inputs, because copying a set to the addresses of another
would leave it in the cache.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .timing import Bench, Call, Run, Step, Times, by_part


class Outputs(NamedTuple):
    """The tensors that a captured step writes."""

    results: dict[str, Tensor]
    gradients: tuple[Tensor, ...]


class Graphs:
    """A step as CUDA graphs: each part by itself and, where there are two, both in one.

    Graphs of one pool share memory: a backward pass must be replayed directly after its forward pass.
    """

    def __init__(self, step: Step, pool: Any, stream: torch.cuda.Stream) -> None:
        def captured(*calls: Call) -> torch.cuda.CUDAGraph:
            graph = torch.cuda.CUDAGraph()
            current = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    for call in calls:
                        call()
            finally:  # a capture that fails leaves its stream current
                torch.cuda.set_stream(current)
            return graph

        try:
            _warm_up(step, stream)
            parts = [captured(part) for part in step.parts]
            self._captures = [(parts, _outputs(step))]
            if len(parts) > 1:
                self._captures.append(([captured(step.both)], _outputs(step)))
        finally:
            step.clear()

    @property
    def replays(self) -> list[list[Call]]:
        """The parts in succession; then, where there are two, the graph of both."""
        return [[graph.replay for graph in graphs] for graphs, _ in self._captures]

    def replayed(self) -> list[Outputs]:
        """Replay everything into memory full of NaN (indices: zero), which shows work that a graph leaves out."""
        with torch.no_grad():  # a gradient may be a view, which autograd lets nothing else write
            for _, outputs in self._captures:
                for tensor in (*outputs.results.values(), *outputs.gradients):
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        for graphs, _ in self._captures:
            for graph in graphs:
                graph.replay()
        torch.cuda.synchronize()
        return [outputs for _, outputs in self._captures]

    def forget(self) -> None:
        """Release the results' memory to other graphs of the pool."""
        self._captures = [(graphs, Outputs({}, ())) for graphs, _ in self._captures]


def _warm_up(step: Step, stream: torch.cuda.Stream) -> None:
    """Run twice on the stream of the capture.  Raises where the host waits for the device, which cannot be captured.

    A capture that fails half-way is worse: torch 2.11 then frees no memory, and the process is of no further use.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.both()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.both()
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _outputs(step: Step) -> Outputs:
    # Of the losses only the sum: the others share the pool's memory and are not read.
    names = ["loss"] if "loss" in step.results else list(step.results)
    outputs = Outputs({name: step.results[name].detach() for name in names}, step.gradients)
    step.clear()
    return outputs


def replayed(bench: Bench, graphs: Sequence[Graphs]) -> Run:
    """A run that times a step in mode graph."""

    def run(index: int) -> dict[str, Times]:
        timed = [bench.time(calls, idle=False) for calls in graphs[index % len(graphs)].replays]
        return by_part([times for calls in timed for times in calls])

    return run
