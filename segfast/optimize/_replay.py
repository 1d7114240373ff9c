"""A program on a GPU as one captured CUDA graph: a call is a copy in, a replay and a copy out."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM = 3  # runs before the capture: kernels are compiled, cuDNN chooses its algorithms
_capturing = threading.Lock()  # one capture at a time in a process


class Waits(RuntimeError):
    """Something needs a value of the device on the host, which a capture does not survive."""


class NothingWaits(TorchDispatchMode):
    """Within, what would wait for the device raises `Waits`: PyTorch does not recover from a capture that fails."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        values = torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags
        if values:
            raise Waits(f"{function} needs values of the device")
        result = function(*args, **(kwargs or {}))
        given, made = ([v for v in tree_leaves(tree) if isinstance(v, Tensor)] for tree in ((args, kwargs), result))
        outside = [v for v in given if v.dim() and not v.is_cuda] + [v for v in made if not v.is_cuda]  # numbers may be anywhere
        if outside and any(v.is_cuda for v in given + made):
            raise Waits(f"{function} copies from the device or to it")
        return result


class Replay:
    """run(*inputs), captured once for these inputs and replayed on others of the same shapes.

    Safe to call from several threads and streams: what the graph reads and writes is in one place, so that calls follow one
    another on the device. Within a capture of the caller's own the operations run, and are captured, one by one.

    Args:
        run: takes and gives a list of tensors and other values.
        inputs: what it is captured with; tensors on one GPU.

    Raises:
        Waits: it needs a value of the device on the host.
        RuntimeError: it has no tensor to take, or is prepared within a capture.
    """

    def __init__(self, run: Callable[..., list], inputs: list):
        tensors = [v for v in inputs if isinstance(v, Tensor)]
        if not tensors:
            raise RuntimeError("no argument is a tensor")
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the caller is capturing")
        self.device = tensors[0].device
        self.lock = threading.Lock()
        self.run = run
        with _capturing, torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            before = torch.cuda.current_stream()
            stream = torch.cuda.Stream()
            try:
                with torch.autocast("cuda", enabled=False):
                    self.inputs = [v.clone() if isinstance(v, Tensor) else v for v in inputs]
                    stream.wait_stream(before)
                    with torch.cuda.stream(stream):
                        for last in range(WARM - 1, -1, -1):
                            with contextlib.nullcontext() if last else NothingWaits():
                                run(*self.inputs)
                    before.wait_stream(stream)
                    self.graph = torch.cuda.CUDAGraph()
                    # On the device's own stream (PyTorch's is one for all devices); other threads may go on meanwhile with what
                    # a capture forbids in its own.
                    with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                        self.outputs = run(*self.inputs)
            finally:
                torch.cuda.set_stream(before)
            self.done = torch.cuda.Event()
            self.done.record()

    def __call__(self, *inputs) -> list:
        if torch.cuda.is_current_stream_capturing():
            return self.run(*inputs)
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)  # the last call, on whatever stream, has taken its results
            for own, given in zip(self.inputs, inputs):
                if isinstance(own, Tensor):
                    own.record_stream(stream)
                    own.copy_(given)
            self.graph.replay()
            results = [v.clone() if isinstance(v, Tensor) else v for v in self.outputs]
            self.done.record()
        return results

    def __del__(self):
        if hasattr(self, "done"):  # the maps go with the graph
            self.done.synchronize()
