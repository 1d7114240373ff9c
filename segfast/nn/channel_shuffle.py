"""Channel shuffles as modules."""

from collections.abc import Sequence

from torch import Tensor, nn

from segfast import ops


class ChannelShuffle(nn.Module):
    """Interleave the channels of `groups` groups; see `segfast.ops.channel_shuffle`. Drop-in for `torch.nn.ChannelShuffle`.

    Args:
        groups: divides the channels of the input.
    """

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return ops.channel_shuffle(x, self.groups)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


class ConcatShuffle(nn.Module):
    """Concatenate branches along channels and shuffle, in one copy; see `segfast.ops.concat_shuffle`.

    Args:
        groups: divides the sum of the branches' channels.
    """

    def __init__(self, groups: int = 2):
        super().__init__()
        self.groups = groups

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return ops.concat_shuffle(tensors, self.groups)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
