"""Exported files as functions: what `segfast predict --model file.onnx` runs, without the network's Python code."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from segfast import _backend
from segfast._packages import need
from segfast.engine import checkpoint
from segfast.engine.run import Network

SUFFIXES = (".onnx", ".pt2", ".pte")


class Artefact:
    """An exported network, a function of images in [0, 1] (N, 3, H, W) of any size.

    It gives logits (N, classes, H, W), or with the head inside the class map (N, H, W), int64. Images of another size than a
    file of fixed size takes are resized to it, and the result back. What the runtime raises comes as a ValueError that names
    the file.

    Attributes:
        about: what the file says of itself: network, preprocessing, size, head, segfast, miou, made.
    """

    def __init__(self, path: Path, about: dict, run):
        self.path, self.about, self.run = path, about, run
        self.preprocessing = checkpoint.preprocessing_of(about, path)

    def network(self) -> Network:
        """What it says of its network; classes without names are numbers."""
        return Network.described(self.about, self.path).named()

    def __call__(self, images: Tensor) -> Tensor:
        size, fixed = tuple(images.shape[2:]), self.about["size"]
        if fixed is not None and tuple(fixed) != size:
            images = F.interpolate(images, tuple(fixed), mode="bilinear", antialias=True)
        batch = self.preprocessing(images * 255).contiguous()
        try:
            result = self.run(batch) if fixed is None else torch.cat([self.run(image[None]) for image in batch])
        except Exception as error:  # of the runtimes, which have no class in common but this
            raise ValueError(
                f"{self.path} does not run on an image of {size[0]}x{size[1]} (networks want at least 32 either way): "
                f"{first_line(error)}"
            ) from error
        if not self.about["head"]:
            return result if tuple(result.shape[2:]) == size else F.interpolate(result, size, mode="bilinear")
        if tuple(result.shape[1:]) != size:
            result = F.interpolate(result[:, None].float(), size, mode="nearest-exact")[:, 0]
        return result.long()


def load(path: str | Path) -> Artefact:
    """An exported .onnx (ONNX Runtime, on the CPU), .pt2 (torch.export or AOTInductor) or .pte file (ExecuTorch).

    Raises:
        FileNotFoundError, ValueError: naming the file: none, another suffix, not whole, or without segfast's metadata.
        ImportError: ONNX Runtime or ExecuTorch is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"want the file {path}, got none")
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".pt2":
        return _pt2(path)
    if path.suffix == ".pte":
        return _pte(path)
    raise ValueError(f"{path}: want a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


# ONNX Runtime on processors without dot products of bytes, where its sums of 16 bits saturate: with other weights, or in float.
# The first rewrites weights, which fails where layers share them, as those of SwiftNet's pyramid do.
EXACT = ("session.x64quantprecision", "session.disable_quant_qdq")


class Session:
    """An ONNX model, a path or its bytes, as a function of a tensor: ONNX Runtime on the CPU, with PyTorch's threads."""

    def __init__(self, model: str | bytes, what: str):
        runtime = need("onnxruntime", what, "deploy")
        exact = _backend._C is not None and _backend._C.cpu_features()["avx512vnni"]
        for entry in (None,) if exact else EXACT:
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 4  # what is wrong comes as an exception
            if entry is not None:
                options.add_session_config_entry(entry, "1")
            try:
                self.session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
                break
            except Exception:  # ONNX Runtime's errors have no class in common but this
                if entry in (None, EXACT[-1]):
                    raise
        self.name = self.session.get_inputs()[0].name

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: x.numpy()})[0])


class Lite:
    """An ExecuTorch program, its bytes, as a function of a tensor."""

    def __init__(self, content: bytes, what: str):
        runtime = need("executorch.runtime", what, "executorch")
        self.program = runtime.Runtime.get().load_program(content)
        self.method = self.program.load_method("forward")

    def __call__(self, x: Tensor) -> Tensor:
        return self.method.execute([x])[0].clone()  # its memory is the method's own

    def about(self) -> str | None:
        """What the program says of itself."""
        return self.program.load_method("segfast").execute([])[0] if "segfast" in self.program.method_names else None


def _onnx(path: Path) -> Artefact:
    need("onnxruntime", f"load {path}", "deploy")
    try:
        run = Session(str(path), f"load {path}")
    except Exception as error:  # ONNX Runtime's errors have no class in common but this
        raise ValueError(f"{path} is no whole ONNX file, or one that ONNX Runtime cannot run: {first_line(error)}") from error
    return Artefact(path, _about(path, run.session.get_modelmeta().custom_metadata_map.get("segfast")), run)


def _pt2(path: Path) -> Artefact:
    try:
        with zipfile.ZipFile(path) as archive:
            text = next((archive.read(name) for name in archive.namelist() if name.endswith("extra/segfast.json")), None)
            compiled = any("aotinductor" in name for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no whole .pt2 file, it may be truncated: {error}") from error
    try:
        if compiled:
            run = torch._inductor.aoti_load_package(str(path))
            text = run.get_metadata().get("segfast")
        else:
            run = torch.export.load(io.BytesIO(path.read_bytes())).module()
    except Exception as error:  # a damaged file comes as any of a dozen
        raise ValueError(f"{path} is no whole .pt2 file, or one that this PyTorch cannot run: {first_line(error)}") from error
    return Artefact(path, _about(path, text), run)


def _pte(path: Path) -> Artefact:
    try:
        run = Lite(path.read_bytes(), f"load {path}")
    except RuntimeError as error:
        raise ValueError(f"{path} is no whole .pte file, or one that ExecuTorch cannot run: {first_line(error)}") from error
    return Artefact(path, _about(path, run.about()), run)


def _about(path: Path, text: str | bytes | None) -> dict:
    if text is None:
        raise ValueError(f"{path} does not say what network it holds: want a file that `segfast export` wrote")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} describes its network in what is no JSON: {error}") from error


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
