"""Private inference ops over weights packed once: schemas. CPU, channels_last, float32 or bfloat16, no gradients.

Importing this module defines `torch.ops.segfast.pack_*` and `packed_*`; activations are the numbers of `ds_conv.ACTIVATIONS`.
Weights are given in float32 and packed for the dtype of the maps: in bfloat16 those of the products are rounded to it. A packed
weight is opaque bytes, from which no fake tensor can tell the number of output channels: there are no fakes, and the operations
are to be called on real tensors only, never inside a graph that is traced.
"""

from __future__ import annotations

import torch

_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
_SCHEMAS = {
    "pack_conv": "(Tensor weight, Tensor bias, int groups, ScalarType? dtype=None) -> Tensor",
    "pack_ds_conv": "(Tensor dw_weight, Tensor dw_bias, Tensor pw_weight, Tensor pw_bias, "
    "ScalarType? dtype=None) -> Tensor",
    "pack_inverted_residual": "(Tensor expand_weight, Tensor expand_bias, Tensor dw_weight, Tensor dw_bias, "
    "Tensor project_weight, Tensor project_bias, ScalarType? dtype=None) -> Tensor",
    "packed_conv": f"(Tensor x, Tensor packed, {_GEOMETRY}, int act, Tensor? add=None) -> Tensor",
    "packed_ds_conv": f"(Tensor x, Tensor packed, {_GEOMETRY}, int dw_act, int act, Tensor? add=None) -> Tensor",
    "packed_inverted_residual": f"(Tensor x, Tensor packed, {_GEOMETRY}, int expand_act, int dw_act, int act, "
    "Tensor? add=None) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"segfast::{_name}", _schema)
