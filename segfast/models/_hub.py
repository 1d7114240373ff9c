"""Networks as folders: weights in safetensors, a config and a model card, as the Hugging Face hub has them; offline too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from segfast._files import write
from segfast._version import __version__
from segfast.models._base import Preprocessing
from segfast.models._registry import NETWORKS, create_model

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(model, folder: str | Path, *, network: dict | None = None, miou: float | None = None) -> Path:
    """See `SegmentationModel.save_pretrained`."""
    if network is None:
        network = {"model": model.name, "num_classes": model.num_classes, **getattr(model, "made_with", {})}
    with torch.device("meta"):
        twin = create_model(network["model"], network["num_classes"], network.get("backbone"), **network.get("options", {}))
    own, theirs = ({name: x.shape for name, x in m.state_dict().items()} for m in (model, twin))
    if own != theirs:
        other = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
        raise ValueError(f"save_pretrained: want what `network` builds, got other tensors, such as {other[:3]}: {network}")
    config = {
        "network": network, "preprocessing": dataclasses.asdict(model.preprocessing), "miou": miou, "segfast": __version__,
    }  # fmt: skip
    folder = Path(folder)
    tensors = {name: x.detach().to("cpu").contiguous().clone() for name, x in model.state_dict().items()}
    # The weights come first, as what the disk may be too small for; config and card are a few hundred bytes.
    for name, content in (
        (WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"})),
        (CONFIG, json.dumps(config, indent=1).encode()),
        (CARD, card(config).encode()),
    ):
        write(folder / name, content)
    return folder


def from_pretrained(source: str | Path, revision: str | None = None):
    """See `SegmentationModel.from_pretrained`."""
    folder = Path(source)
    if not folder.is_dir():
        folder = download(str(source), revision)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"from_pretrained: want {CONFIG} and {WEIGHTS} in {folder}, got no {missing[0]}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        network = config["network"]
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"from_pretrained: {folder} is not what save_pretrained wrote: {error}") from error
    model = create_model(network["model"], network["num_classes"], network.get("backbone"), **network.get("options", {}))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"from_pretrained: {folder / WEIGHTS} does not fit {network['model']}: {error}") from error
    if "preprocessing" in config:
        try:
            model.preprocessing = Preprocessing.of(config["preprocessing"])
        except TypeError as error:
            raise ValueError(f"from_pretrained: {folder / CONFIG} says of preprocessing what is unknown here: {error}") from error
    return model.eval()


def download(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"from_pretrained: got no folder {repository}; to fetch a repository want huggingface_hub: pip install 'segfast[hub]'"
        ) from error
    return Path(snapshot_download(repository, revision=revision, allow_patterns=[WEIGHTS, CONFIG]))


def card(config: dict) -> str:
    """The model card."""
    network, miou = config["network"], config["miou"]
    known = NETWORKS[network["model"]]
    lines = [
        "---", "library_name: segfast", "pipeline_tag: image-segmentation", "tags: [semantic-segmentation, real-time]", "---", "",
        f"# {network['model']}", "", f"{known.paper}.", "",
        f"- classes: {network['num_classes']}" + (f" ({', '.join(network['classes'])})" if network.get("classes") else ""),
        f"- mean IoU: {'not measured' if miou is None else f'{miou:.4f}'}",
        f"- made with segfast {config['segfast']}", "",
        "```python", "import segfast", "",
        'model = segfast.models.SegmentationModel.from_pretrained("PATH OR REPOSITORY")',
        "classes = model.predict(image)  # a PIL image, or uint8 array (H, W, 3)", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)
