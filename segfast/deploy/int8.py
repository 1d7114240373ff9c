"""int8 through torchao's PT2E flow, with the layers that cost too much kept in float, and training that knows of the rounding.

Weights are int8 a channel, symmetric; activations uint8 a tensor, with ranges from calibration images. BatchNorms are folded.
What comes out is an ATen graph at one image size or at any, which PyTorch runs, segfast.optimize puts on int8 kernels of ours,
torch.compile on oneDNN's, and ONNX takes as QuantizeLinear and DequantizeLinear pairs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from segfast._packages import need
from segfast.deploy import export
from segfast.deploy.artefact import Session
from segfast.distill import create_method
from segfast.engine import checkpoint
from segfast.engine.run import Features, Network
from segfast.engine.train import poly, train
from segfast.nn import resize
from segfast.nn.folding import fold, foldable

OBSERVERS = ("mse", "percentile", "min-max")
FEWEST = 8  # images that a calibration takes at least
PERCENTILE = 0.9999
LEAD = 0.2  # of the best class over the second, in standard deviations of the logits, that rounding does not turn
TURNED, NUDGE = 0.01, 1e-4  # the share of such pixels that may turn, and the change of an image that shows how many do anyway
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
Score = Callable[[Callable[[Tensor], Tensor]], float]


class Quantized(nn.Module):
    """An int8 network: images (N, 3, H, W) of its size, as `model.preprocessing` makes them, to logits of that size.

    One that was made with `dynamic=True` takes images of any size.

    It computes in float between roundings; `segfast.optimize(quantized)` runs it on int8 kernels.

    Attributes:
        graph: ATen operators with quantised convolutions; one image in, logits at their own stride out.
        about: network, preprocessing, size, whether others do too, align_corners, observer, layers in float.
    """

    def __init__(self, graph: nn.Module, about: Mapping, preprocessing):
        super().__init__()
        self.graph, self.about, self.preprocessing = graph, dict(about), preprocessing
        for module in self.modules():  # the exported graph has one mode, that of evaluation, and refuses to be told
            module.training = False

    def train(self, mode: bool = True):
        """Says the mode; there is one."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        return resize(self.logits(images), images.shape[2:], self.about["align_corners"])

    def logits(self, images: Tensor) -> Tensor:
        """At their own stride.

        Raises:
            ValueError: images of another size.
        """
        if self.about["dynamic"]:
            return self.graph(images)
        if tuple(images.shape[1:]) != (3, *self.about["size"]):
            raise ValueError(f"quantized: want images (N, 3, {self.about['size']}), got {tuple(images.shape)}")
        return torch.cat([self.graph(image[None]) for image in images])


class Logits(nn.Module):
    """A network up to its logits, for export."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_features(images).logits


class Classes(nn.Module):
    """The int8 graph with its head."""

    def __init__(self, quantized: Quantized, head: bool):
        super().__init__()
        # Not "graph": of the module that torch.export makes, that is the graph itself.
        self.body, self.head, self.align_corners = quantized.graph, head, quantized.about["align_corners"]
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        logits = self.body(images)
        if self.head:
            return export.to_classes(logits, images, self.align_corners)
        return resize(logits, images.shape[2:], self.align_corners)


def quantize(
    model: nn.Module,
    images: Sequence[Tensor],
    *,
    observer: str = "mse",
    keep: Iterable[str] = (),
    score: Score | None = None,
    max_drop: float | None = None,
    dynamic: bool = False,
    network: Mapping | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Quantized:
    """Post-training static int8.

    Args:
        model: a network of `segfast.models` in evaluation mode; not changed.
        images: for calibration, at least 8, each (3, H, W) as `model.preprocessing` makes them, of one size.
        observer: how ranges of activations are found: "mse" (least squared error over a histogram), "percentile" (99.99 %) or
            "min-max".
        keep: names of layers that stay in float.
        score: gives the mIoU, 0 to 1, of a function from images to logits of their size; needed for `max_drop`.
        max_drop: the most that int8 may lose, in points of mIoU. Layers are kept in float, the costliest by `sensitivity` first,
            one, then twice as many, until it holds; `about["sensitivity"]` then has what each costs.
        dynamic: the result takes images of any size, not only the calibration's.
        network: what a weights file says of its network, to be saved.
        say: called with lines about what was tried.

    Raises:
        ValueError: too few images, sizes that differ, an activation that is not finite (the layer is named), a `keep` that
            names no layer; or no choice of layers holds `max_drop`; or, with `dynamic`, the network is not exact at other sizes.
        ImportError: torchao is missing.
    """
    need("torchao", "quantize", "deploy")
    images = checked(model, images)
    if observer not in OBSERVERS:
        raise ValueError(f"quantize: want an observer among {', '.join(OBSERVERS)}, got {observer!r}")
    names, kept = list(layers(model)), list(keep)
    unknown = [name for name in kept if name not in names]
    if unknown:
        raise ValueError(f"quantize: want layers of {model.name} to keep, such as {names[0]!r}, got {unknown}")
    if max_drop is not None and score is None:
        raise ValueError("quantize: want a score with max_drop, got none")
    ranges(model, images)
    quantized = static(model, images, observer, kept, network, dynamic)
    if max_drop is None:
        return quantized
    exact = score(model)
    loss = 100 * (exact - score(quantized))
    say(f"float {exact:.4f}, int8 {exact - loss / 100:.4f}")
    if loss <= max_drop:
        return quantized
    costs = sensitivity(model, images, score, exact=exact)
    order = [name for name in costs if name not in kept]
    for name, cost in costs.items():
        say(f"  {name}: {cost:+.2f}")
    count = 1
    while order:
        chosen = kept + order[:count]
        quantized = static(model, images, observer, chosen, network, dynamic)
        loss = 100 * (exact - score(quantized))
        say(f"{len(chosen)} layers in float: {exact - loss / 100:.4f}")
        if loss <= max_drop:
            quantized.about["sensitivity"] = costs
            return quantized
        if count >= len(order):
            break
        count = min(2 * count, len(order))
    raise ValueError(f"quantize: int8 loses {loss:.2f} points of mIoU with all layers in float: want a larger max_drop")


def static(
    model: nn.Module, images: list[Tensor], observer: str, kept: Sequence[str], network: Mapping | None, dynamic: bool
) -> Quantized:
    """The int8 network of images that are known to be good."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    prepared = prepare(model, tuple(images[0].shape[1:]), observer, kept, dynamic)
    with torch.no_grad():
        for image in images:
            prepared(image[None])
    graph = convert_pt2e(prepared)
    about = export.describe(model, images[0].shape[1:], False, network, None, "segfast.deploy.quantize")
    about |= {"quantized": "static int8", "observer": observer, "float_layers": list(kept), "dynamic": dynamic}
    return Quantized(graph, about, model.preprocessing)


def prepare(model: nn.Module, size: tuple[int, int], observer: str, kept: Sequence[str], dynamic: bool) -> nn.Module:
    """The network's graph with an observer at every range."""
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.observer import HistogramObserver
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    class PercentileObserver(HistogramObserver):
        def _non_linear_param_search(self):
            return shares(self.histogram, self.min_val, self.max_val)

    observers = {"mse": HistogramObserver, "percentile": PercentileObserver, "min-max": MinMaxObserver}
    config = x86.get_default_x86_inductor_quantization_config()
    activation = dataclasses.replace(
        config.input_activation,
        observer_or_fake_quant_ctr=observers[observer].with_args(eps=2**-12),
    )
    config = dataclasses.replace(config, input_activation=activation, output_activation=activation)
    quantizer = x86.X86InductorQuantizer().set_global(config)
    for name in kept:
        quantizer.set_module_name_qconfig(f"network.{name}", None)
    with torch.no_grad(), export._quiet():
        program = export.traced(Logits(model), model, size, dynamic, "quantize").module(check_guards=not dynamic)
        if dynamic:
            # What holds of the sizes traced with need not of others; whether the graph does is seen by running it.
            program._forward_pre_hooks.clear()
            export.check(model, lambda x: resize(program(x), x.shape[2:], model.align_corners), size, True, False, "quantize")
        tell_calls_apart(program.graph)
        return prepare_pt2e(program, quantizer)


def tell_calls_apart(graph: torch.fx.Graph) -> None:
    """Names the second call of a module otherwise: the quantiser takes all calls of a shared ReLU for one and gives up."""
    seen = set()
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op != "call_function" or not stack:
            continue
        key, (name, kind) = list(stack.items())[-1]
        if (name, node.target) in seen:
            node.meta["nn_module_stack"] = {**stack, key: (f"{name}@{node.name}", kind)}
        seen.add((name, node.target))


def shares(histogram: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range that leaves 1 - PERCENTILE of the values out, half on each side, of a histogram from `low` to `high`."""
    total = histogram.cumsum(0) / histogram.sum()
    step = (high - low) / len(histogram)
    first = int((total < (1 - PERCENTILE) / 2).sum())
    last = int((total < 1 - (1 - PERCENTILE) / 2).sum()) + 1
    return low + step * first, low + step * min(last, len(histogram))


def checked(model: nn.Module, images: Iterable[Tensor]) -> list[Tensor]:
    images = list(images)
    if model.training:
        raise RuntimeError(f"quantize: want {model.name} in evaluation mode: call .eval() first")
    if len(images) < FEWEST:
        raise ValueError(f"quantize: want at least {FEWEST} calibration images, some of every kind of scene, got {len(images)}")
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1 or any(len(size) != 3 or size[0] != 3 for size in sizes):
        raise ValueError(f"quantize: want calibration images (3, H, W) of one size, got {sorted(sizes)}: crop or resize them")
    return images


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}


@torch.no_grad()
def ranges(model: nn.Module, images: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """The smallest and largest input of every convolution.

    Raises:
        ValueError: one is not finite; the layer is named.
    """
    seen: dict[str, tuple[float, float]] = {}

    def note(name: str):
        def hook(_, args):
            low, high = (float(x) for x in args[0].aminmax())
            if not abs(low) + abs(high) < float("inf"):
                raise ValueError(
                    f"quantize: want finite activations, got {low} to {high} at the input of the layer {name!r}: look for NaN "
                    "in the images and in the weights before it"
                )
            before = seen.get(name, (0.0, 0.0))
            seen[name] = min(before[0], low), max(before[1], high)

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers(model).items()]
    try:
        for image in images:
            if not model.forward_features(image[None]).logits.isfinite().all():
                raise ValueError(f"quantize: want finite logits, got others: look for NaN in the last layers of {model.name}")
    finally:
        for handle in handles:
            handle.remove()
    return seen


def weight_axis(module: nn.Module) -> int:
    """The axis of a convolution's weight that counts its outputs."""
    return 1 if isinstance(module, nn.ConvTranspose2d) and module.groups == 1 else 0


def channel_scale(weight: Tensor, axis: int) -> Tensor:
    """The step of int8 a channel, broadcast along the others."""
    return (weight.abs().amax([i for i in range(weight.dim()) if i != axis], keepdim=True) / 127.5).clamp(min=1e-12)


class RoundedWeight(nn.Module):
    """A weight as int8 a channel has it; gradients pass."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        scale = channel_scale(weight.detach(), self.axis).flatten()
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, self.axis, -128, 127)


class RoundedInput:
    """A hook that rounds a convolution's input to uint8 within a range, which follows the batches in training mode."""

    def __init__(self, low: float, high: float, momentum: float = 0.05):
        self.low, self.high, self.momentum = low, high, momentum

    def __call__(self, module: nn.Module, args):
        x, *others = args  # a transposed convolution may be told its output's size
        if module.training:
            low, high = (float(v) for v in x.detach().aminmax())
            self.low += self.momentum * (min(0.0, low) - self.low)
            self.high += self.momentum * (max(0.0, high) - self.high)
        scale = max((self.high - self.low) / 255, 1e-12)
        return (torch.fake_quantize_per_tensor_affine(x, scale, min(255, round(-self.low / scale)), 0, 255), *others)


@contextlib.contextmanager
def rounded(model: nn.Module, at: Mapping[str, tuple[float, float]]) -> Iterator[None]:
    """The network in place with the convolutions `at`, with the ranges of their inputs, as int8 would compute them."""
    found = layers(model)
    handles = [found[name].register_forward_pre_hook(RoundedInput(*limits)) for name, limits in at.items()]
    for name in at:
        parametrize.register_parametrization(found[name], "weight", RoundedWeight(weight_axis(found[name])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in at:
            parametrize.remove_parametrizations(found[name], "weight", leave_parametrized=False)


def sensitivity(model: nn.Module, images: Sequence[Tensor], score: Score, *, exact: float | None = None) -> dict[str, float]:
    """What each layer alone costs in int8, in points of mIoU, the costliest first; simulated in float.

    Args:
        model, images, score: as in `quantize`.
        exact: the score in float, where it is known.
    """
    limits = ranges(model, images)
    exact = score(model) if exact is None else exact
    costs = {}
    for name, limit in limits.items():
        with rounded(model, {name: limit}):
            costs[name] = 100 * (exact - score(model))
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def quantize_aware(
    model: nn.Module,
    images: Sequence[Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    *,
    method: str = "pixel-wise",
    learning_rate: float = 2e-4,
    observer: str = "mse",
    keep: Iterable[str] = (),
    dynamic: bool = False,
    network: Mapping | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> Quantized:
    """Train on with every convolution rounded as int8 has it, distilled from the float network, then quantise.

    Args:
        model: in evaluation mode; the teacher, not changed.
        images: for calibration, as in `quantize`.
        loader: batches (images as the network takes them, labels), of any size.
        steps: of AdamW.
        method: of distillation, see `segfast.distill.list_methods()`.
        learning_rate: the peak.
        observer, keep, dynamic, network: as in `quantize`.
        progress: as in `segfast.engine.train`.

    Raises:
        ValueError, FloatingPointError: as `quantize` and `segfast.engine.train`.
    """
    need("torchao", "quantize_aware", "deploy")
    images = checked(model, images)
    student, keep = copy.deepcopy(model), tuple(keep)
    limits = {name: limit for name, limit in ranges(student, images).items() if name not in keep}
    teacher = copy.deepcopy(model).requires_grad_(False)
    learner = create_method(method, student, teacher)
    with rounded(student, limits):
        optimizer = torch.optim.AdamW([*student.parameters(), *learner.parameters()], lr=learning_rate)
        # BatchNorm keeps its statistics: rounding shifts no mean by much, and small batches would.
        train(
            Features(student, freeze_bn=True), loader, lambda _, x, labels: learner(x, labels), optimizer, steps, poly(), progress
        )
    return quantize(student.eval(), images, observer=observer, keep=keep, dynamic=dynamic, network=network)


def save_quantized(quantized: Quantized, path: str | Path, miou: float | None = None, made: str | None = None) -> Path:
    """A safetensors file of int8 weights, their scales and the activations' scales; `load_quantized` reads it.

    Args:
        quantized: what `quantize` gave.
        path: of the file.
        miou, made: for the metadata; `made` instead of "segfast.deploy.quantize".
    """
    tensors = read_tensors(quantized.graph)
    zero = [name for name, x in tensors.items() if name.startswith("_zero_point") and not x.any()]
    about = {**quantized.about, "miou": miou, "activations": activation_scales(quantized.graph), "zero": zero}
    about["made"] = made or about["made"]
    return checkpoint.save(path, {name: x for name, x in tensors.items() if name not in zero}, about)


def load_quantized(path: str | Path) -> Quantized:
    """The network that `save_quantized` wrote.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    tensors, about = checkpoint.load(path)
    if about.get("quantized") != "static int8":
        raise ValueError(f"{path} holds no int8 network: want a file that `segfast quantize` wrote")
    need("torchao", "load_quantized", "deploy")
    model = Network.described(about, path).build().eval()
    about = {"dynamic": False, **about}  # files of before there were others
    checkpoint.take_preprocessing(model, about, path)
    try:
        images = [torch.zeros(3, *about["size"])]
        quantized = static(model, images, "min-max", about["float_layers"], about["network"], about["dynamic"])
        own = read_tensors(quantized.graph)
        tensors |= {name: torch.zeros_like(own[name]) for name in about["zero"]}
        if {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in tensors.items()}:
            raise ValueError("other tensors")
        for node, (scale, zero) in zip(activation_nodes(quantized.graph), about["activations"], strict=True):
            node.args = (node.args[0], float(scale), int(zero), *node.args[3:])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not fit what torchao {metadata.version('torchao')} and PyTorch {torch.__version__} make of its "
            f"network: want it quantised again with these releases ({error!r})"
        ) from error
    for name, x in own.items():
        x.copy_(tensors[name])
    quantized.graph.recompile()
    quantized.about = {name: value for name, value in about.items() if name not in ("activations", "zero")}
    return quantized


def read_tensors(graph) -> dict[str, Tensor]:
    """The tensors that the graph reads; torchao leaves the float weights beside those that took their places."""
    wanted = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    own = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    return {name: own[name].detach() for name in sorted(wanted)}


def activation_nodes(graph) -> list:
    return [n for n in graph.graph.nodes if n.op == "call_function" and "quantize_per_tensor" in str(n.target)]


def activation_scales(graph) -> list[tuple[float, int]]:
    return [(float(n.args[1]), int(n.args[2])) for n in activation_nodes(graph)]


def quantize_onnx(
    quantized: Quantized, path: str | Path, *, head: bool = True, opset: int = export.OPSET, miou: float | None = None,
    made: str = "segfast.deploy.quantize_onnx",
) -> export.Exported:  # fmt: skip
    """The PT2E graph as ONNX with QuantizeLinear and DequantizeLinear pairs and int8 weights.

    Its sizes are free if the network was quantised so. ONNX Runtime's result is compared with the graph's, then at a second, odd
    size too. Rounding falls differently on a few activations, and through many layers on more: of the pixels whose class leads
    by a fifth of the logits' standard deviation at most 1 % may turn, or, of a network whose classes hang on less, twice the
    share that turns in PyTorch when the image changes by one part in 10,000. `agreement` is of all pixels.

    Raises:
        ValueError, ImportError: as `segfast.deploy.export_onnx`.
    """
    path = export._target(path, ".onnx")
    export.check_opset("quantize_onnx", opset)
    for package in export.ONNX:
        need(package, "quantize_onnx", "deploy")
    size, dynamic = tuple(quantized.about["size"]), quantized.about["dynamic"]
    whole = Classes(quantized, head)
    example, free = export.traced_with(whole, size, dynamic)
    about = {**quantized.about, "size": None if dynamic else size, "head": head, "miou": miou, "made": made}
    with export._quiet(), torch.no_grad():
        program = torch.export.export(whole, (example,), dynamic_shapes=free)
        try:
            translated = export.Translated(program, opset, about)
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(export._untranslated(program, error, "quantize_onnx")) from error
    run, agreement = Session(translated.content, "quantize_onnx"), 1.0
    plain = whole if not head else Classes(quantized, False)
    generator = torch.Generator().manual_seed(0)
    for at in export.compared_at(size, dynamic):
        images = torch.randn(1, 3, *at, generator=generator)
        with torch.no_grad():
            logits = plain(images)
        got = run(images)
        same = (got if head else got.argmax(1)) == logits.argmax(1)
        best = logits.topk(min(2, logits.shape[1]), dim=1).values
        clear = best[:, 0] - best[:, -1] >= LEAD * logits.std()
        agreement = min(agreement, float(same.float().mean()))
        if clear.any() and (turned := 1 - float(same[clear].float().mean())) > TURNED:
            with torch.no_grad():
                nudged = plain(images * (1 + NUDGE)).argmax(1) != logits.argmax(1)
            if turned > (allowed := max(TURNED, 2 * float(nudged[clear].float().mean()))):
                raise ValueError(
                    f"quantize_onnx: want at least {1 - allowed:.2%} of the pixels of a clear class as PyTorch's int8 has them, "
                    f"got {1 - turned:.2%}; nothing was written"
                )
    return translated.write(path, None, agreement)


def half(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A copy of the network in bfloat16 or float16, a function from float32 images to float32 logits of their size."""
    smaller = copy.deepcopy(model).to(dtype)
    return lambda images: smaller(images.to(dtype)).float()


def read_by(model: nn.Module) -> dict[str, str]:
    """The convolutions by name, and the BatchNorm that reads each one's output, as far as running the network shows it."""
    made: dict[int, tuple[str, Tensor]] = {}  # with the tensors, so that no other takes their identity
    found: dict[str, str] = {}
    names = {module: name for name, module in model.named_modules()}

    def note(module, args, result):
        if not isinstance(module, nn.BatchNorm2d):
            made[id(result)] = names[module], result
        elif id(args[0]) in made:
            found[made[id(args[0])][0]] = names[module]

    handles = [m.register_forward_hook(note) for m in names if isinstance(m, (*CONVOLUTIONS, nn.BatchNorm2d))]
    try:
        model.forward_features(noise(model))
    finally:
        for handle in handles:
            handle.remove()
    return found


def noise(model: nn.Module) -> Tensor:
    """An image."""
    return torch.randn(1, 3, 2 * model.min_size, 2 * model.min_size, generator=torch.Generator().manual_seed(0))


def only_add(norm: nn.BatchNorm2d, bias: Tensor) -> None:
    """Make a BatchNorm the addition of a bias."""
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    norm.weight.fill_(1)
    norm.bias.copy_(bias)


@torch.no_grad()
def folded(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy whose BatchNorms add alone where a convolution before them takes their scale, and the names of these."""
    smaller, names = copy.deepcopy(model), []
    for name, norm in read_by(smaller).items():
        conv, bn = smaller.get_submodule(name), smaller.get_submodule(norm)
        if not foldable(conv, bn) or (isinstance(conv, nn.ConvTranspose2d) and conv.groups > 1):
            continue
        weight, bias = fold(conv, bn)
        conv.weight.copy_(weight)
        if conv.bias is not None:
            conv.bias.zero_()
        only_add(bn, bias)
        names.append(norm)
    want, got = model(noise(model)), smaller(noise(model))
    if not torch.allclose(got, want, rtol=0, atol=export.TOLERANCE * float(want.abs().max())):
        return copy.deepcopy(model), []  # a convolution that others read too, or that runs twice
    return smaller, names


@torch.no_grad()
def weights_only(model: nn.Module) -> nn.Module:
    """A copy of the network whose convolutions' weights are rounded to int8 a channel; the arithmetic is float's."""
    smaller, _ = folded(model)
    for module in layers(smaller).values():
        module.weight.copy_(RoundedWeight(weight_axis(module))(module.weight))
    return smaller


def save_weights_only(
    model: nn.Module,
    path: str | Path,
    network: Mapping,
    miou: float | None = None,
    made: str = "segfast.deploy.save_weights_only",
) -> Path:
    """A safetensors file of int8 weights a channel and their scales, the rest as it is; `load_weights_only` reads it.

    Of a BatchNorm that reads a convolution the scale goes into the weights', and its bias alone is left.

    Args:
        model: in evaluation mode; not changed.
        path: of the file.
        network: what a weights file says of its network.
        miou, made: for the metadata.
    """
    smaller, norms = folded(model)
    tensors = smaller.state_dict()
    for name, module in layers(smaller).items():
        scale = channel_scale(module.weight.detach(), weight_axis(module))
        tensors[f"{name}.weight"] = (module.weight.detach() / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[f"{name}.weight.scale"] = scale
    for norm in norms:
        for name in ("weight", "running_mean", "running_var", "num_batches_tracked"):
            del tensors[f"{norm}.{name}"]
    about = export.describe(model, None, False, network, miou, made)
    return checkpoint.save(path, tensors, {**about, "quantized": "int8", "weights_only": True})


@torch.no_grad()
def load_weights_only(path: str | Path) -> nn.Module:
    """The network, in evaluation mode, with float weights at int8's places.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    tensors, about = checkpoint.load(path)
    if not about.get("weights_only"):
        raise ValueError(f"{path} does not hold int8 weights alone: want a file that `segfast quantize --mode weights` wrote")
    model = Network.described(about, path).build()
    try:
        for name in [name for name in tensors if name.endswith(".weight.scale")]:
            scale = tensors.pop(name)
            tensors[name.removesuffix(".scale")] = tensors[name.removesuffix(".scale")].float() * scale
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and f"{name}.running_var" not in tensors:
                only_add(module, tensors[f"{name}.bias"])
                tensors |= module.state_dict(prefix=f"{name}.")
        model.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit the network that it names: {error}") from error
    checkpoint.take_preprocessing(model, about, path)
    return model.eval()
