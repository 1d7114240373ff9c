"""Files that are whole or not there: weights and training state as safetensors, without pickle anywhere."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segfast._files import write
from segfast._weights import misfit
from segfast.models import Preprocessing


def save(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping) -> Path:
    """Tensors and what JSON can hold, in one safetensors file; see `write`."""
    # safetensors refuses tensors that share memory, and those of other layouts.
    tensors = {name: x.detach().to("cpu").contiguous().clone() for name, x in tensors.items()}
    return write(path, safetensors.torch.save(tensors, {"segfast": json.dumps(about)}))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """What `save` wrote: tensors on the CPU, and the rest.

    Raises:
        FileNotFoundError: there is none.
        ValueError: naming the file: a pickle (which could run code when it is opened), truncated, or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"want the file {path}, got none")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("segfast", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if zipfile.is_zipfile(path) or start[:1] == b"\x80" or start == b"PK":
            raise ValueError(
                f"{path} is a pickle (torch.save), which can run code when it is opened: want safetensors. "
                "segfast.load_official reads the authors' files"
            ) from error
        raise ValueError(f"{path} is no whole safetensors file, it may be truncated: {error}") from error


def pack(value, tensors: dict[str, Tensor], name: str):
    """A state of nested dicts, lists, tensors and numbers as JSON, its tensors moved into `tensors`; `unpack` undoes it."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, pack(v, tensors, f"{name}.{key}")] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"pack: want tensors, dicts, lists, numbers and strings, got {type(value).__name__} at {name}")


def unpack(packed, tensors: Mapping[str, Tensor]):
    """The state that `pack` took apart."""
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unpack(v, tensors) for key, v in value}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(unpack(v, tensors) for v in value)
    return value


def save_state(path: str | Path, state: Mapping) -> Path:
    """A nested state of tensors, dicts, lists and numbers, in one file; see `write`."""
    tensors: dict[str, Tensor] = {}
    structure = pack(dict(state), tensors, "state")
    return save(path, tensors, {"structure": structure})


def load_state(path: str | Path) -> dict:
    """What `save_state` wrote; raises as `load`, and ValueError for another safetensors file."""
    tensors, about = load(path)
    if "structure" not in about:
        raise ValueError(f"{path} holds weights, want a training state")
    return unpack(about["structure"], tensors)


def preprocessing_of(about: Mapping, path: str | Path) -> Preprocessing:
    """What a file tells of its network's preprocessing.

    Raises:
        ValueError: naming the file: it tells nothing, or what this release does not know.
    """
    try:
        return Preprocessing.of(about["preprocessing"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} says of its preprocessing what this release does not know: {error!r}") from error


def take_preprocessing(model: torch.nn.Module, about: Mapping, path: str | Path) -> None:
    """Give a network the preprocessing that its file tells of, if it does; raises as `preprocessing_of`."""
    if "preprocessing" in about:
        model.preprocessing = preprocessing_of(about, path)


def load_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Load weights that `save` wrote into a network of the same shape.

    Raises:
        ValueError: naming the file and what does not fit, or that it is quantised; the network is unchanged then.
    """
    tensors, about = load(path)
    if about.get("quantized"):
        loader = "load_weights_only" if about.get("weights_only") else "load_quantized"
        raise ValueError(
            f"{path} holds {about['quantized']} weights and their scales, not a float network's: load it with "
            f"segfast.deploy.{loader}, or take the float file that it was made from"
        )
    if wrong := misfit(model, tensors):
        raise ValueError(f"{path} does not fit the network: {wrong}")
    model.load_state_dict(tensors)
