"""Stand-in until the fused module lands."""

from torch import Tensor, nn

_ACTS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish, None: nn.Identity, "none": nn.Identity}


class DSConv(nn.Module):
    def __init__(
        self, dw_channels, out_channels, stride=1, *, kernel_size=3, padding=None, dilation=1, bias=False,
        dw_act="relu", act="relu", norm_layer=nn.BatchNorm2d, eps=1e-5, momentum=0.1, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.conv = nn.Sequential(
            nn.Conv2d(dw_channels, dw_channels, kernel_size, stride, padding, dilation, dw_channels, bias),
            norm_layer(dw_channels, eps=eps, momentum=momentum),
            _ACTS[dw_act](),
            nn.Conv2d(dw_channels, out_channels, 1, bias=bias),
            norm_layer(out_channels, eps=eps, momentum=momentum),
            _ACTS[act](),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
