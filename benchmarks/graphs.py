"""Training steps as CUDA graphs.

A graph has fixed addresses.  One is captured for each set of inputs, because copying a set to the addresses of another
would leave it in the cache.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .cases import PARTS
from .timing import Bench, Call, Step, Times

Outputs = tuple[dict[str, Tensor], tuple[Tensor, ...]]  # losses and gradients that a captured step writes


class Graphs:
    """A step as CUDA graphs: each part by itself and, where there are two, both in one.

    Graphs of one pool share memory: a backward pass must be replayed directly after its forward pass.
    """

    def __init__(self, step: Step, pool: Any, stream: torch.cuda.Stream) -> None:
        self._graphs: list[list[torch.cuda.CUDAGraph]] = []
        self._outputs: list[Outputs] = []
        sequences: list[list[Call]] = [step.parts, [step.both]] if len(step.parts) > 1 else [step.parts]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):  # a capture that fails leaves its stream current
                step.both()
                # Raise where the host waits for the device.  torch 2.11 frees no memory after a capture that fails half-way.
                torch.cuda.set_sync_debug_mode("error")
                step.both()
                torch.cuda.set_sync_debug_mode("default")
                for calls in sequences:
                    graphs = [torch.cuda.CUDAGraph() for _ in calls]
                    for graph, call in zip(graphs, calls, strict=True):
                        with torch.cuda.graph(graph, pool=pool, stream=stream):
                            call()
                    # Of the losses only the sum: the others share the pool's memory and are not read.
                    names = ["loss"] if "loss" in step.results else list(step.results)
                    results = {name: step.results[name].detach() for name in names}
                    self._outputs.append((results, step.gradients))
                    self._graphs.append(graphs)
                    step.clear()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            step.clear()

    def first_replay(self) -> list[Outputs]:
        """Replay everything into memory full of NaN (indices: zero), which shows work that a graph leaves out.

        The memory of the outputs that are returned is free for other graphs of the pool once they are dropped.
        """
        outputs, self._outputs = self._outputs, []
        with torch.no_grad():  # a gradient may be a view, which autograd lets nothing else write
            for results, gradients in outputs:
                for tensor in (*results.values(), *gradients):
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        for graph in chain(*self._graphs):
            graph.replay()
        torch.cuda.synchronize()
        return outputs

    def time(self, bench: Bench) -> dict[str, Times]:
        """The times of every part in mode graph."""
        times = [bench.time([graph.replay for graph in graphs], idle=False) for graphs in self._graphs]
        return dict(zip(PARTS, chain(*times), strict=False))
