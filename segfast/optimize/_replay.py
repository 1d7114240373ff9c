"""A program on a GPU as one captured CUDA graph: a call is a copy in, a replay and a copy out."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

WARM = 3  # runs before the capture: kernels are compiled, cuDNN chooses its algorithms


class Replay:
    """run(*inputs), captured once for these inputs and replayed on others of the same shapes.

    Safe to call from several threads and streams: what the graph reads and writes is in one place, so that calls follow one
    another on the device.

    Args:
        run: takes and gives a list of tensors and other values; must not wait for the device.
        inputs: what it is captured with; tensors on one GPU.

    Raises:
        RuntimeError: it cannot be captured.
    """

    def __init__(self, run: Callable[..., list], inputs: list):
        tensors = [v for v in inputs if isinstance(v, Tensor)]
        if not tensors:
            raise RuntimeError("no argument is a tensor")
        self.device = tensors[0].device
        self.lock = threading.Lock()
        with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            with torch.autocast("cuda", enabled=False):
                self.inputs = [v.clone() if isinstance(v, Tensor) else v for v in inputs]
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM):
                        run(*self.inputs)
                torch.cuda.current_stream().wait_stream(stream)
                self.graph = torch.cuda.CUDAGraph()
                # Other threads may go on with what a capture forbids in its own.
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.outputs = run(*self.inputs)
            self.done = torch.cuda.Event()
            self.done.record()

    def __call__(self, *inputs) -> list:
        with self.lock, torch.cuda.device(self.device):
            torch.cuda.current_stream().wait_event(self.done)  # the last call, on whatever stream, has taken its results
            for own, given in zip(self.inputs, inputs):
                if isinstance(own, Tensor):
                    own.copy_(given)
            self.graph.replay()
            results = [v.clone() if isinstance(v, Tensor) else v for v in self.outputs]
            self.done.record()
        return results
