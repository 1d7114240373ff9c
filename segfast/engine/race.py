"""A network from the image tensor to its class map: `segfast.optimize` against other ways of running it, taken in turns."""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

import torch
from torch import Tensor, nn

from segfast.engine import checkpoint
from segfast.engine.bench import Times, references, summary
from segfast.engine.environment import environment
from segfast.engine.report import STYLE, table
from segfast.optimize import OptimizedModel, optimize

PEERS = ("eager", "channels_last", "inductor", "onnxruntime", "openvino")
SETTLE = 0.02  # seconds; the thread pools of other libraries spin for a while after a call
CALLS = 5  # timed calls a turn
AGREE = {torch.float32: 0.995, torch.bfloat16: 0.9}  # pixels of random logits whose two best classes are that far apart
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INCLUDED = {
    "classes": "one image, from its normalised float32 tensor to the uint8 class of every pixel, with resize and argmax",
    "logits": "one image, from its normalised float32 tensor to logits",
}
NOTE = (
    "eager and channels_last: PyTorch without this package's kernels; inductor: torch.compile, frozen, channels_last; "
    "onnxruntime and openvino: the exported graph with its own resize and argmax"
)

Call = Callable[[], Tensor]


@dataclass
class Step:
    """One step of the optimised network and its median time."""

    kind: str
    how: str
    scope: str
    shape: tuple[int, ...]
    milliseconds: float


@dataclass
class Race:
    """Times of one network at one size; `absent` says why a peer is not among them."""

    name: str
    size: tuple[int, int]
    batch: int
    dtype: str
    target: str
    milliseconds: dict[str, Times]
    absent: dict[str, str]
    steps: list[Step] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """The fastest peer."""
        peers = {name: times.median for name, times in self.milliseconds.items() if name != "segfast"}
        return min(peers, key=peers.get) if peers else None

    @property
    def ratio(self) -> float | None:
        """How many times as long the fastest peer takes."""
        return self.milliseconds[self.best].median / self.milliseconds["segfast"].median if self.best else None


class ToClasses(nn.Module):
    """A network and the best class of every pixel, uint8 but for `segfast.optimize`, whose option that is."""

    def __init__(self, network: nn.Module, cast: bool = True):
        super().__init__()
        self.network, self.cast = network, cast
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        classes = self.network(images).argmax(1)
        return classes.to(torch.uint8) if self.cast else classes


def race(
    name: str,
    network: nn.Module,
    size: tuple[int, int],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    target: str = "classes",
    peers: Sequence[str] = PEERS,
    seconds: float = 10.0,
    say: Callable[[str], None] = lambda text: None,
) -> Race:
    """Time a network, optimised and by its peers, interleaved in this process.

    Args:
        name: for the table.
        network: images (N, 3, H, W) to logits of their size, in evaluation mode.
        size: (H, W) of the images.
        batch: images a call.
        dtype: float32 or bfloat16, of all that can run in it.
        target: "classes" or "logits".
        peers: of PEERS.
        seconds: of timing, about.
        say: called with what is being done.

    Raises:
        ValueError: a peer or target that is none.
        AssertionError: a peer or the optimised network computes something else.
    """
    wrong = [peer for peer in peers if peer not in PEERS]
    if wrong or target not in INCLUDED:
        raise ValueError(f"race: want peers of {', '.join(PEERS)}, classes or logits, got {', '.join(wrong)} and {target}")
    torch.manual_seed(0)
    images = torch.randn(batch, 3, *size)
    say("optimising")
    ours = optimized(network, images, dtype, target)
    calls: dict[str, Call] = {"segfast": lambda: ours(images)}
    with torch.no_grad(), references():
        plain = (ToClasses(network) if target == "classes" else network)(images)
    absent = {}
    with tempfile.TemporaryDirectory() as folder:
        for peer in peers:
            say(f"preparing {peer}")
            made = prepare(peer, network, images, dtype, target, Path(folder))
            if isinstance(made, str):
                absent[peer] = made
            else:
                calls[peer] = made
        with torch.inference_mode():
            for way, call in calls.items():
                require_alike(way, call(), plain, dtype)
            say("timing")
            taken = interleave(calls, seconds)
            steps = [
                Step(step.kind, how, step.output.scope, step.output.shape, round(ms, 4))
                for step, how, ms in ours.profile(images, runs=7)
            ]
    times = {way: summary(values) for way, values in taken.items()}
    return Race(name, tuple(size), batch, str(dtype).removeprefix("torch."), target, times, absent, steps, facts())


def optimized(network: nn.Module, images: Tensor, dtype: torch.dtype, target: str) -> OptimizedModel:
    whole = ToClasses(network, cast=False) if target == "classes" else network
    return optimize(whole, images, dtype=dtype, class_dtype=torch.uint8)


def prepare(way: str, network: nn.Module, images: Tensor, dtype: torch.dtype, target: str, folder: Path) -> Call | str:
    """The network by "segfast" or one of PEERS, ready to run; or why it cannot."""
    if way == "segfast":
        ours = optimized(network, images, dtype, target)
        return lambda: ours(images)
    return MAKE[way](ToClasses(network) if target == "classes" else network, images, dtype, folder)


def facts() -> dict[str, str]:
    """What the figures depend on besides the code."""
    known = environment()
    result = {key: known[key] for key in ("segfast", "torch", "processor", "threads", "kernel set") if key in known}
    for package in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(package):
            result[package] = importlib.import_module(package).__version__
    return result


def require_alike(way: str, result: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    if result.dtype == torch.uint8:
        same = float((result == plain).double().mean())
        if same < AGREE[dtype]:
            raise AssertionError(f"{way}: {100 * same:.1f} % of the classes are those of eager PyTorch: not measured")
        return
    off = float((result.double() - plain.double()).abs().max() / plain.double().abs().max())
    if not off <= (1e-2 if dtype == torch.float32 else 0.1):
        raise AssertionError(f"{way} computes something else (off by {off:.2g} of the largest logit): not measured")


def interleave(calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call, in rounds: what else the machine does falls on all of them."""
    taken: dict[str, list[float]] = {way: [] for way in calls}
    start = time.perf_counter()
    while min(map(len, taken.values())) < 2 * CALLS or time.perf_counter() - start < seconds:
        for way, call in calls.items():
            time.sleep(SETTLE)
            call()
            for _ in range(CALLS):
                begin = time.perf_counter()
                call()
                taken[way].append(1000 * (time.perf_counter() - begin))
    return taken


def in_dtype(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    if dtype == torch.float32:
        return network
    return copy.deepcopy(network).to(dtype)


def make_eager(network, images, dtype, folder) -> Call:
    network = in_dtype(network, dtype)

    def call():
        with references():
            return network(images.to(dtype))

    return call


def make_channels_last(network, images, dtype, folder) -> Call:
    network = copy.deepcopy(network).to(dtype, memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)

    def call():
        with references():
            return network(images.to(dtype))

    return call


def make_inductor(network, images, dtype, folder) -> Call | str:
    network = copy.deepcopy(network).to(dtype, memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x.to(dtype))

    try:
        with references(), torch.inference_mode():
            compiled = torch.compile(Cast().eval(), options={"freezing": True})
            compiled(images)
    except Exception as error:
        return f"does not compile: {str(error).strip().partition(chr(10))[0]}"

    def call():
        with references():
            return compiled(images)

    return call


def exported(network, images, folder: Path) -> Path:
    path = folder / "network.onnx"
    if not path.exists():
        with torch.no_grad():
            torch.onnx.export(network, (images,), path, dynamo=True, verbose=False, input_names=["images"])
    return path


def make_onnxruntime(network, images, dtype, folder) -> Call | str:
    if dtype != torch.float32:
        return "has no bfloat16 on the CPU"
    if not importlib.util.find_spec("onnxruntime") or not importlib.util.find_spec("onnxscript"):
        return "not installed: pip install onnxruntime onnxscript"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(exported(network, images, folder)), options, providers=["CPUExecutionProvider"])
    array = images.numpy()
    return lambda: torch.from_numpy(session.run(None, {"images": array})[0])


def make_openvino(network, images, dtype, folder) -> Call | str:
    if not importlib.util.find_spec("openvino") or not importlib.util.find_spec("onnxscript"):
        return "not installed: pip install openvino onnxscript"
    import openvino

    return call_openvino(openvino.Core().read_model(exported(network, images, folder)), images, dtype)


def call_openvino(model, images, dtype) -> Call:
    """An OpenVINO model on PyTorch's threads."""
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    array = images.numpy()
    return lambda: torch.from_numpy(request.infer([array], share_inputs=True, share_outputs=True)[0])


MAKE = {
    "eager": make_eager,
    "channels_last": make_channels_last,
    "inductor": make_inductor,
    "onnxruntime": make_onnxruntime,
    "openvino": make_openvino,
}


def write(folder: Path, races: Sequence[Race]) -> list[Path]:
    """`bench.json` and `bench.html`, each whole or not at all."""
    rows = [asdict(r) | {"best": r.best, "ratio": r.ratio} for r in races]
    text = json.dumps({"included": INCLUDED, "ways": NOTE, "races": rows}, indent=1) + "\n"
    return [checkpoint.write(folder / "bench.json", text), checkpoint.write(folder / "bench.html", html(races))]


def html(races: Sequence[Race]) -> str:
    """A page that needs nothing else: bars of all ways, and the steps of the optimised network."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>segfast bench</title>",
        f"<style>{STYLE}</style><h1>segfast bench</h1><p>{escape(NOTE)}.</p>",
    ]
    for r in races:
        images = "" if r.batch == 1 else f", batch {r.batch}"
        parts += [
            f"<h2>{escape(r.name)}, {r.size[0]}x{r.size[1]}{images}, {r.dtype}</h2>",
            f"<p>{escape(INCLUDED[r.target])}. {escape(verdict(r))}</p>",
            bars({way: times.median for way, times in r.milliseconds.items()}),
            *(f"<p>{escape(peer)}: {escape(reason)}</p>" for peer, reason in r.absent.items()),
            "<h3>Steps of the optimised network</h3>",
            layers(r.steps),
            table(["", ""], [[escape(k), escape(v)] for k, v in r.environment.items()], 2),
        ]
    return "\n".join([*parts, "</html>\n"])


def verdict(r: Race) -> str:
    """One sentence: who is the fastest."""
    if r.best is None:
        return ""
    word = "faster" if r.ratio >= 1 else "slower"
    factor = r.ratio if r.ratio >= 1 else 1 / r.ratio
    return f"{factor:.2f} times {word} than the best peer, {r.best}."


def bars(values: Mapping[str, float]) -> str:
    """A bar a way, the shortest first."""
    top = max(values.values())
    parts = [f'<svg viewBox="0 0 900 {30 * len(values) + 6}" width="100%" font-size="13" role="img">']
    for i, (way, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        y, width, fill = 30 * i, 560 * value / top, "#2a9d4e" if way == "segfast" else "#8a93a0"
        parts.append(f'<text x="0" y="{y + 17}">{escape(way)}</text>')
        parts.append(f'<rect x="130" y="{y + 3}" width="{width:.1f}" height="20" fill="{fill}"/>')
        parts.append(f'<text x="{136 + width:.1f}" y="{y + 17}">{value:.2f} ms</text>')
    return "".join([*parts, "</svg>"])


def layers(steps: Sequence[Step]) -> str:
    """A bar a step, in the order in which they run."""
    top, total = max(s.milliseconds for s in steps), sum(s.milliseconds for s in steps)
    parts = [f'<svg viewBox="0 0 1100 {20 * len(steps) + 6}" width="100%" font-size="11" role="img">']
    for i, s in enumerate(steps):
        y, width = 20 * i, 300 * s.milliseconds / top
        shape = "x".join(map(str, s.shape or ()))
        parts.append(f'<text x="0" y="{y + 13}">{escape(s.kind)}</text><text x="170" y="{y + 13}">{escape(s.scope[-44:])}</text>')
        parts.append(f'<text x="450" y="{y + 13}">{shape}</text>')
        parts.append(
            f'<rect x="570" y="{y + 2}" width="{width:.1f}" height="14" fill="#1b6ca8"><title>{escape(s.how)}</title></rect>'
        )
        share = 100 * s.milliseconds / total
        parts.append(f'<text x="{576 + width:.1f}" y="{y + 13}">{s.milliseconds:.2f} ms, {share:.0f} % ({escape(s.how)})</text>')
    return "".join([*parts, "</svg>"])
