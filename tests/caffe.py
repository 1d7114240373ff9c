"""Runs the few kinds of Caffe layers that ICNet's published graph is made of."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def parse(text: str) -> list[tuple[str, str | list]]:
    """The (key, value) pairs of a text in protobuf's text format; a value is a string or such a list."""
    text = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    stack: list[list] = [[]]
    for key, value, opening, closing in re.findall(r'(\w+)\s*:\s*("[^"]*"|[^\s{}]+)|(\w+)\s*:?\s*\{|(\})', text):
        if opening:
            inner: list = []
            stack[-1].append((opening, inner))
            stack.append(inner)
        elif closing:
            stack.pop()
        else:
            stack[-1].append((key, value.strip('"')))
    return stack[0]


class Net(nn.Module):
    """A graph with weights; parameters are named `<layer>.weight` and `<layer>.bias`."""

    def __init__(self, text: str, input_channels: int = 3):
        super().__init__()
        self.layers = [pairs for key, pairs in parse(text) if key == "layer"]
        self.weights, channels = {}, {"data": input_channels}
        for pairs in self.layers:
            layer = dict(pairs)
            if layer["type"] == "Convolution":
                size = {key: int(value) for key, value in layer["convolution_param"] if key in ("num_output", "kernel_size")}
                shape = (size["num_output"], channels[layer["bottom"]], size["kernel_size"], size["kernel_size"])
                self.weights[f"{layer['name']}.weight"] = torch.zeros(shape)
                self.weights[f"{layer['name']}.bias"] = torch.zeros(shape[0])
                channels[layer["top"]] = shape[0]
            else:
                channels[layer["top"]] = channels[layer["bottom"]]

    def state_dict(self):
        return self.weights

    def load_state_dict(self, weights, strict=True):
        self.weights = weights

    def forward(self, data: Tensor) -> Tensor:
        blobs = {"data": data}
        for pairs in self.layers:
            layer, bottoms = dict(pairs), [blobs[value] for key, value in pairs if key == "bottom"]
            blobs[layer["top"]] = self.run(layer, bottoms)
        return blobs[layer["top"]]

    def run(self, layer: dict, bottoms: list[Tensor]) -> Tensor:
        (x, *_), kind = bottoms, layer["type"]
        options = {key: value for name in layer if name.endswith("_param") for key, value in layer[name]}
        number = lambda key, default=None: int(options.get(key, default))  # noqa: E731
        if kind == "Convolution":
            weight, bias = (self.weights[f"{layer['name']}.{what}"] for what in ("weight", "bias"))
            return F.conv2d(x, weight, bias, number("stride", 1), number("pad", 0), number("dilation", 1))
        if kind == "Pooling" and options["pool"] == "MAX":
            return F.max_pool2d(x, number("kernel_size"), number("stride"), number("pad", 0), ceil_mode=True)
        if kind == "Pooling":
            kernel, stride = ((number(f"{what}_h"), number(f"{what}_w")) for what in ("kernel", "stride"))
            return F.avg_pool2d(x, kernel, stride, ceil_mode=True)
        if kind == "Interp":
            if "height" in options:
                size = (number("height"), number("width"))
            elif "zoom_factor" in options:
                size = [n + (n - 1) * (number("zoom_factor") - 1) for n in x.shape[2:]]
            else:
                size = [(n - 1) // number("shrink_factor") + 1 for n in x.shape[2:]]
            return F.interpolate(x, size, mode="bilinear", align_corners=True)
        if kind == "Eltwise":
            return sum(bottoms)
        return {"ReLU": F.relu, "Scale": lambda x: x}[kind](x)  # the Scale is of the input, by 1
