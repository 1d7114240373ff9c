"""Export: ONNX, and ATen operators alone for torch.export, AOTInductor and ExecuTorch, each checked before it is written."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from segfast import ops
from segfast._files import check_writable
from segfast._packages import need
from segfast._version import __version__
from segfast.deploy.artefact import Lite, Session, first_line
from segfast.engine import checkpoint

OPSET = 20
MOST_OPSET = 25
ONNX = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of float logits, relative to the largest
AGREEMENT = 0.999  # of the pixels of class maps
FREE = (
    200,
    264,
)  # H and W at least, of the images that graphs of free size are traced with: no map has one row, taken for the rule

# What TensorRT's ONNX parser takes since release 8.4 (onnx-tensorrt, docs/operators.md of that release), as far as segmentation
# networks come near it. Later releases take more.
TENSORRT = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "ArgMax",
        "ArgMin",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "ConvTranspose",
        "Cos",
        "CumSum",
        "DepthToSpace",
        "DequantizeLinear",
        "Div",
        "Dropout",
        "Einsum",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gemm",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Greater",
        "GreaterOrEqual",
        "HardSigmoid",
        "Identity",
        "InstanceNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "MatMul",
        "Max",
        "MaxPool",
        "Mean",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "PRelu",
        "Pad",
        "Pow",
        "QuantizeLinear",
        "Range",
        "ReduceL1",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Resize",
        "Round",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "Shape",
        "Sigmoid",
        "Sign",
        "Sin",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "SpaceToDepth",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tanh",
        "Tile",
        "TopK",
        "Transpose",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what was checked before.

    bytes: its size; unstripped: that of the ONNX file with the exporter's stack traces and doc strings.
    error: of the logits against PyTorch, relative to the largest; agreement: of the class maps, share of the pixels. None: the
        other kind of output, or not checked.
    operators: how many of each; refused: those that TensorRT's parser does not take. Of ONNX.
    """

    path: Path
    bytes: int
    unstripped: int | None = None
    error: float | None = None
    agreement: float | None = None
    operators: Mapping[str, int] = dataclasses.field(default_factory=dict)
    refused: tuple[str, ...] = ()


class ClassMap(nn.Module):
    """A network with its head: images (N, 3, H, W) to classes (N, H, W), uint8 (int32 with more than 256 classes)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return to_classes(self.network.forward_features(images).logits, images, self.network.align_corners)


def to_classes(logits: Tensor, images: Tensor, align_corners: bool) -> Tensor:
    """The head: classes at the images' size, uint8, or int32 where there are more than 256."""
    dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int32
    return ops.upsample_argmax(logits, images.shape[2:], align_corners, dtype=dtype)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    size: tuple[int, int],
    *,
    dynamic: bool = False,
    head: bool = False,
    opset: int = OPSET,
    network: Mapping | None = None,
    miou: float | None = None,
    made: str = "segfast.deploy.export_onnx",
) -> Exported:
    """Write a network as ONNX, after ONNX Runtime has agreed with PyTorch on it.

    Args:
        model: a network of `segfast.models` in evaluation mode; its input is what `model.preprocessing` makes of an image.
        path: of the file; it appears whole or not at all.
        size: (H, W) of the images.
        dynamic: batch, H and W are free; `size` is then an example. A network that is not exact at other sizes is refused.
        head: resize and argmax are inside, the output is a class map.
        opset: of ONNX, 18 or later.
        network: what a weights file says of its network, for the metadata; None: the name and number of classes.
        miou: for the metadata.
        made: how, for the metadata.

    Raises:
        ValueError: an operator that ONNX has not, with the layer that it stands in; or a file that gives other numbers than
            PyTorch (1e-4 of the largest logit, 99.9 % of the pixels); nothing is written then.
        RuntimeError: the network is in training mode.
        ImportError: the extra `segfast[deploy]` is missing.
    """
    path = _target(path, ".onnx")
    for package in ONNX:
        need(package, "export_onnx", "deploy")
    check_opset("export_onnx", opset)
    program = _program(model, size, dynamic, head, "export_onnx")
    about = describe(model, None if dynamic else size, head, network, miou, made)
    try:
        translated = Translated(program, opset, about)
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(_untranslated(program, error, "export_onnx")) from error
    error, agreement = check(model, Session(translated.content, "export_onnx"), size, dynamic, head, "export_onnx")
    return translated.write(path, error, agreement)


class Translated:
    """A program as the bytes of an ONNX model, stripped, with its metadata.

    Args:
        program: what torch.export gave, of one input.
        opset: of ONNX.
        about: the metadata; its "head" says what the output is.
    """

    def __init__(self, program, opset: int, about: Mapping):
        import onnx

        with _quiet():
            proto = torch.onnx.export(
                program, dynamo=True, verbose=False, opset_version=opset, input_names=["images"],
                output_names=["classes" if about["head"] else "logits"],
            ).model_proto  # fmt: skip
        self.unstripped = proto.ByteSize()
        strip(proto)
        part_zero_points(proto)
        onnx.helper.set_model_props(proto, {"segfast": json.dumps(about)})
        self.content, self.operators = proto.SerializeToString(), operators(proto)

    def write(self, path: Path, error: float | None, agreement: float | None) -> Exported:
        """The file, once it has been checked."""
        checkpoint.write(path, self.content)
        refused = tuple(sorted(set(self.operators) - TENSORRT))
        return Exported(path, len(self.content), self.unstripped, error, agreement, self.operators, refused)


def export_program(
    model: nn.Module,
    path: str | Path,
    size: tuple[int, int],
    *,
    compiled: bool = False,
    head: bool = False,
    network: Mapping | None = None,
    miou: float | None = None,
    made: str = "segfast.deploy.export_program",
) -> Exported:
    """Write a network's ATen graph at a fixed size as a .pt2 file, which runs without segfast.

    It runs on PyTorch's own kernels: what ours save is lost (docs/deploy.md has figures).

    Args:
        compiled: by AOTInductor, for this processor (needs a C++ compiler); else a program for `torch.export.load`.
        model, path, size, head, network, miou, made: as in `export_onnx`.

    Raises:
        ValueError, RuntimeError: as `export_onnx`.
    """
    path = _target(path, ".pt2")
    program = _program(model, size, False, head, "export_program")
    about = json.dumps(describe(model, size, head, network, miou, made))
    if compiled:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), _quiet():
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=f"{folder}/network.pt2", inductor_configs={"aot_inductor.metadata": {"segfast": about}}
            )
            content, run = Path(package).read_bytes(), torch._inductor.aoti_load_package(package)
    else:
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # the source's paths and lines on this machine
        program.example_inputs = None
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"segfast.json": about})
        content, run = buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module()
    error, agreement = check(model, run, size, False, head, "export_program")
    checkpoint.write(path, content)
    return Exported(path, len(content), None, error, agreement)


def export_executorch(
    model: nn.Module,
    path: str | Path,
    size: tuple[int, int],
    *,
    head: bool = True,
    network: Mapping | None = None,
    miou: float | None = None,
    made: str = "segfast.deploy.export_executorch",
) -> Exported:
    """Write a network at a fixed size as a .pte file for ExecuTorch, which phones and boards run: on XNNPACK where that can.

    Args:
        model, path, size, head, network, miou, made: as in `export_onnx`.

    Raises:
        ValueError, RuntimeError: as `export_onnx`.
        ImportError: ExecuTorch is missing.
    """
    path = _target(path, ".pte")
    for package in ("executorch.exir", "executorch.runtime"):
        need(package, "export_executorch", "executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = _program(model, size, False, head, "export_executorch")
    about = json.dumps(describe(model, size, head, network, miou, made))
    with torch.no_grad(), _quiet():
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods={"segfast": about})
        content = edge.to_executorch().buffer
    error, agreement = check(model, Lite(content, "export_executorch"), size, False, head, "export_executorch")
    checkpoint.write(path, content)
    return Exported(path, len(content), None, error, agreement)


def describe(model: nn.Module, size, head: bool, network: Mapping | None, miou: float | None, made: str) -> dict:
    """The metadata of every artefact: network, classes, palette, preprocessing, version, mIoU, how it was made."""
    return {
        "network": dict(network)
        if network
        else {"model": model.name, "num_classes": model.num_classes, **getattr(model, "made_with", {})},
        "preprocessing": dataclasses.asdict(model.preprocessing),
        "size": None if size is None else list(size),
        "head": head,
        "align_corners": model.align_corners,
        "miou": miou,
        "segfast": __version__,
        "torch": torch.__version__,
        "made": made,
    }


def strip(proto) -> None:
    """Remove what no runtime reads from an ONNX model: stack traces, doc strings, inferred shapes of intermediate results."""
    proto.doc_string = ""
    for graph in (proto.graph, *proto.functions):
        graph.doc_string = ""
        del graph.value_info[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            for attribute in node.attribute:
                attribute.doc_string = ""
        del graph.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]


def part_zero_points(proto) -> None:
    """Give every int8 DequantizeLinear a zero point of its own: ONNX Runtime, asked not to saturate on processors without dot
    products of bytes, turns weights and zero points to uint8 one node after the other, and fails on what two of them share."""
    held = {x.name: x for x in proto.graph.initializer if x.data_type == x.INT8}
    seen = set()
    for number, node in enumerate(proto.graph.node):
        name = node.input[2] if node.op_type == "DequantizeLinear" and len(node.input) > 2 else None
        if name in seen:
            copy = proto.graph.initializer.add()
            copy.CopyFrom(held[name])
            copy.name = node.input[2] = f"{name}_{number}"
        elif name in held:
            seen.add(name)


def operators(proto) -> dict[str, int]:
    """How often an ONNX model uses each operator; those of other domains as "domain::name"."""
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    names = (f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type for node in nodes)
    return dict(sorted(Counter(names).items()))


def compared_at(size: tuple[int, int], dynamic: bool) -> list[tuple[int, int]]:
    """The sizes of the two images that an artefact is compared on: its own, and then an odd one where any will do."""
    return [size, (size[0] + 33, size[1] + 51) if dynamic else size]


def check_finite(model: nn.Module, what: str) -> None:
    for name, x in model.state_dict().items():
        if x.is_floating_point() and not x.isfinite().all():
            raise ValueError(
                f"{what}: want finite weights, got NaN or infinities in {name}: the training of {model.name} went wrong"
            )


@torch.no_grad()
def check(model: nn.Module, run, size: tuple[int, int], dynamic: bool, head: bool, what: str) -> tuple:
    """(error, agreement) of `run` against the network, the worst of two images.

    Raises:
        ValueError: more than the tolerance allows.
    """
    reference = ClassMap(model) if head else model
    generator = torch.Generator().manual_seed(0)
    error, agreement = 0.0, 1.0
    check_finite(model, what)
    for number, at in enumerate(compared_at(size, dynamic)):
        images = torch.randn(1 + (dynamic and number), 3, *at, generator=generator)
        want = reference(images)
        try:
            got = run(images)
        except Exception as failure:  # ONNX Runtime's errors have no class in common but this
            raise ValueError(
                f"{what}: {model.name} does not run at {at[0]}x{at[1]} once exported at {size[0]}x{size[1]}: want a fixed size "
                f"(dynamic=False): {failure}"
            ) from failure
        if head:
            agreement = min(agreement, float((got == want).float().mean()))
        elif not got.isfinite().all():
            error = float("inf")
        else:
            error = max(error, float((got - want).abs().max() / want.abs().max()))
    if error > TOLERANCE or agreement < AGREEMENT:
        off = f"{agreement:.2%} of the pixels agree" if head else f"the logits are off by {error:.2g} of the largest"
        remedy = "want a fixed size (dynamic=False)" if dynamic else "the exporter translates one of its layers wrongly"
        raise ValueError(f"{what}: {model.name} gives other numbers once exported ({off}): {remedy}; nothing was written")
    return (None, agreement) if head else (error, None)


def check_opset(what: str, opset: int) -> None:
    if not 18 <= opset <= MOST_OPSET:
        raise ValueError(f"{what}: want an opset from 18 to {MOST_OPSET}, which the exporter writes, got {opset}")


def _target(path: str | Path, suffix: str) -> Path:
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"export: want a file that ends in {suffix}, got {path}")
    check_writable(path)
    return path


def _program(model: nn.Module, size: tuple[int, int], dynamic: bool, head: bool, what: str):
    if model.training:
        raise RuntimeError(f"{what}: want {model.name} in evaluation mode: call .eval() first")
    if len(size) != 2 or min(size) < model.min_size:
        raise ValueError(f"{what}: want a size (H, W) of at least {model.min_size} for {model.name}, got {tuple(size)}")
    return traced(ClassMap(model) if head else model, model, size, dynamic, what)


def traced(wrapped: nn.Module, model: nn.Module, size: tuple[int, int], dynamic: bool, what: str):
    """What torch.export makes of `wrapped`, which runs `model`.

    Raises:
        ValueError: it cannot; the layer is named.
    """
    images, free = traced_with(model, size, dynamic)
    entered: list[str] = []
    with _entering(model, entered), _quiet(), torch.no_grad():
        try:
            return torch.export.export(wrapped, (images,), dynamic_shapes=free)
        except Exception as error:  # torch.export lets through whatever a layer raises while it is traced
            layer = entered[-1] if entered else model.name
            hint = " A fixed size (dynamic=False) may do." if dynamic else ""
            raise ValueError(
                f"{what}: cannot export the layer {layer!r} ({type(model.get_submodule(layer)).__name__ if entered else layer}): "
                f"{first_line(error)}. Want tensor operations alone, no control flow on values: replace the layer.{hint}"
            ) from error


def traced_with(model: nn.Module, size: tuple[int, int], dynamic: bool) -> tuple[Tensor, tuple | None]:
    """Images to trace with, and which of their axes are free, as torch.export wants to be told."""
    weight = next((x for x in model.parameters() if x.is_floating_point()), torch.empty(0))
    like = {"device": weight.device, "dtype": weight.dtype}
    if not dynamic:
        return torch.randn(1, 3, *size, **like), None
    return torch.randn(2, 3, *map(max, size, FREE), **like), ({axis: torch.export.Dim.AUTO for axis in (0, 2, 3)},)


@contextlib.contextmanager
def _entering(model: nn.Module, entered: list[str]) -> Iterator[None]:
    """Keeps in `entered` the names of the layers that are running, the innermost last."""
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: entered.append(name)))
            handles.append(module.register_forward_hook(lambda m, args, result: entered.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _untranslated(program, error: Exception, what: str) -> str:
    """What ONNX has no translation for, and the layer in which it stands."""
    texts, seen = [], error
    while seen is not None:
        texts.append(str(seen))
        seen = seen.__cause__
    text = "\n".join(texts)
    found = re.search(r"node %?(\w+)", text)
    target = re.search(r"target=([\w.:]+)", text)
    layer = place = ""
    # The exporter translates what the operators decompose into.
    for node in program.run_decompositions().graph.nodes:
        if found and (node.name == found[1] or (target and target[1].removeprefix("torch.ops.") in str(node.target))):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            layer = re.sub(r"^L\['self'\]\.?", "", str(stack[-1][0])) if stack else ""
            lines = re.findall(r'File "(.*?)", line (\d+), in', node.meta.get("stack_trace") or "")
            place = f" ({lines[-1][0]}:{lines[-1][1]})" if lines else ""
            break
    operator = target[1] if target else found[1] if found else "an operator"
    return (
        f"{what}: ONNX has no {operator} as {f'the layer {layer!r}' if layer else 'the network itself'} uses it{place}: want "
        f"another there, a fixed size (dynamic=False), or export_program, which takes every ATen operator: {first_line(error)}"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes: what concerns the caller comes as an error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
