"""ResNet with what segmentation networks ask of it: dilation, the deep stem, stages before their last ReLU."""

from __future__ import annotations

from torch import Tensor, nn

from segfast._weights import misfit
from segfast.nn.folding import conv_bn_act
from segfast.nn.residual import BasicBlock, Bottleneck, NormLayer, conv

DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class Stage(nn.Sequential):
    """Residual units one after the other."""

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's output, and the same before its last ReLU."""
        *units, last = self
        for unit in units:
            x = unit(x)
        x = last.pre_activation(x)
        return last.relu(x), x


class ResNet(nn.Module):
    """ResNet-18, 34, 50, 101 or 152 (He et al., arXiv:1512.03385) without its classifier.

    The parameters have torchvision's names, so that `state_dict`s of torchvision and timm load (without `fc.*`). `forward`
    gives the maps of the four stages, `channels` and `strides` are theirs.

    Args:
        depth: 18, 34, 50, 101 or 152.
        deep_stem: three 3 x 3 convolutions (64, 64, 128 channels) in the place of the 7 x 7, as in PSPNet.
        output_stride: of the last stage: 32, 16 or 8; strides that fall away are made up for by dilation.
        dilate_first: whether the first unit of a stage whose stride fell away has the stage's dilation, as in SKD's PSPNet;
            else that of the stage before, as in torchvision.
        ceil_mode: of the stem's pooling (SKD's PSPNet).
        stem: whether the map after the stem's ReLU (stride 2) comes first in the pyramid.
        norm_layer: called with the channel count.

    Raises:
        ValueError: an unknown depth or output stride.
    """

    def __init__(
        self,
        depth: int,
        deep_stem: bool = False,
        output_stride: int = 32,
        dilate_first: bool = True,
        ceil_mode: bool = False,
        stem: bool = False,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"ResNet: want depth one of {', '.join(map(str, DEPTHS))}, got {depth}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"ResNet: want output_stride 8, 16 or 32, got {output_stride}")
        block, depths = DEPTHS[depth]
        self.deep_stem, self.stem_map = deep_stem, stem
        width = 128 if deep_stem else 64
        if deep_stem:
            self.conv1, self.bn1 = conv(3, 64, 3, 2), norm_layer(64)
            self.conv2, self.bn2 = conv(64, 64, 3), norm_layer(64)
            self.conv3, self.bn3 = conv(64, width, 3), norm_layer(width)
        else:
            self.conv1, self.bn1 = conv(3, width, 7, 2), norm_layer(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
        channels, strides, stride, dilation, in_channels = [], [], 4, 1, width
        for i, units in enumerate(depths):
            before, step = dilation, 1 if i == 0 else 2
            if stride * step > output_stride:
                dilation, step = dilation * step, 1
            first = dilation if dilate_first else before
            planes = 64 << i
            stage = [block(in_channels, planes, step, dilation, first, norm_layer=norm_layer)]
            in_channels = planes * block.expansion
            stage += [block(in_channels, planes, 1, dilation, norm_layer=norm_layer) for _ in range(units - 1)]
            self.add_module(f"layer{i + 1}", Stage(*stage))
            stride *= step
            channels.append(in_channels)
            strides.append(stride)
        self.channels = (width, *channels) if stem else tuple(channels)
        self.strides = (2, *strides) if stem else tuple(strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_stem(self, x: Tensor) -> Tensor:
        """The map after the stem's ReLU, before its pooling: stride 2."""
        x = conv_bn_act(x, self.conv1, self.bn1, self.relu)
        if self.deep_stem:
            x = conv_bn_act(x, self.conv2, self.bn2, self.relu)
            x = conv_bn_act(x, self.conv3, self.bn3, self.relu)
        return x

    def forward_both(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The stages' outputs, and the same before their last ReLU; without the stem's map."""
        x = self.maxpool(self.forward_stem(x))
        outputs, before = [], []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x, pre = stage.both(x)
            outputs.append(x)
            before.append(pre)
        return outputs, before

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of `strides`, from fine to coarse."""
        maps = []
        x = self.forward_stem(x)
        if self.stem_map:
            maps.append(x)
        x = self.maxpool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Load a `state_dict` of torchvision or timm, whose classifier is left out.

        Raises:
            RuntimeError: it is of another network; nothing is changed then.
        """
        tensors = {key: value for key, value in state.items() if not key.startswith("fc.")}
        if wrong := misfit(self, tensors):
            raise RuntimeError(f"ResNet: these are not its weights: {wrong}")
        self.load_state_dict(tensors)
