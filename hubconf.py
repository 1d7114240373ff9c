"""`torch.hub.load("<owner>/segfast", "fast_scnn", num_classes=19)`: every network, and `pretrained` for a saved folder."""

dependencies = ["torch", "numpy", "safetensors"]

import functools  # noqa: E402

from segfast.models import NETWORKS, SegmentationModel, create_model  # noqa: E402


def pretrained(source: str, revision: str | None = None):
    """A network that `save_pretrained` wrote: a folder, or a repository on the Hugging Face hub."""
    return SegmentationModel.from_pretrained(source, revision)


for _name, _network in NETWORKS.items():
    _entry = functools.partial(create_model, _name)
    _entry.__doc__ = f"{_network.paper}; random weights."
    globals()[_name] = _entry
