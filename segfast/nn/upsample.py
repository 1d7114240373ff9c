"""Heads over the ops: losses at image size of logits at their own stride."""

from torch import Tensor, nn

from segfast import ops
from segfast.ops.upsample_cross_entropy import check_options, check_weight


class UpsampleCrossEntropy(nn.Module):
    """Cross-entropy at the target's size: `segfast.ops.upsample_cross_entropy` as a module.

    In place of `nn.CrossEntropyLoss()(F.interpolate(logits, target.shape[1:], mode="bilinear"), target)`.

    Args:
        weight: (C,), float, of each class; a buffer.
        ignore_index, label_smoothing, ohem_threshold, ohem_min_kept, align_corners, reduction: as in the op.

    Raises:
        ValueError: an option out of range, as the op raises it.
        TypeError: a weight that is not a tensor of a real float dtype.
    """

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        label_smoothing: float = 0.0,
        ohem_threshold: float | None = None,
        ohem_min_kept: int = 0,
        align_corners: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_weight("UpsampleCrossEntropy", weight)
        check_options("UpsampleCrossEntropy", label_smoothing, ohem_threshold, ohem_min_kept, reduction)
        self.register_buffer("weight", weight)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.ohem_threshold, self.ohem_min_kept = ohem_threshold, ohem_min_kept
        self.align_corners, self.reduction = align_corners, reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C, H, W) of any stride and labels (N, H', W')."""
        return ops.upsample_cross_entropy(
            logits, target, ignore_index=self.ignore_index, weight=self.weight, label_smoothing=self.label_smoothing,
            ohem_threshold=self.ohem_threshold, ohem_min_kept=self.ohem_min_kept, align_corners=self.align_corners,
            reduction=self.reduction,
        )  # fmt: skip

    def extra_repr(self) -> str:
        ohem = (
            "" if self.ohem_threshold is None else f", ohem_threshold={self.ohem_threshold}, ohem_min_kept={self.ohem_min_kept}"
        )
        return (
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}{ohem}, "
            f"align_corners={self.align_corners}, reduction={self.reduction!r}"
        )
