"""The loss of training on labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segfast import ops

IGNORED = 255


class LabelLoss(nn.Module):
    """Cross-entropy over the labelled pixels in nats, and that of the auxiliary heads; a task of `create_method` too.

    Of several processes it is the mean over the pixels of all. With class weights the mean is weighted, as in F.cross_entropy.
    OHEM (Shrivastava et al., arXiv:1604.03540) takes the mean over the hard pixels alone: those whose class has less than
    `ohem` probability, and at least `ohem_keep` of the labelled.

    Args:
        class_weights: a factor a class; None: 1.
        ohem: probability below which a pixel is hard; 0: all pixels count.
        ohem_keep: share of the labelled pixels that counts at least.
        label_smoothing: share of the target that is spread over all classes.
        aux_weight: factor of the auxiliary heads' sum.
    """

    def __init__(
        self,
        class_weights: Sequence[float] | None = None,
        ohem: float = 0.0,
        ohem_keep: float = 1 / 16,
        label_smoothing: float = 0.0,
        aux_weight: float = 0.4,
    ):
        super().__init__()
        self.register_buffer("class_weights", None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32))
        self.ohem, self.ohem_keep, self.label_smoothing, self.aux_weight = ohem, ohem_keep, label_smoothing, aux_weight

    def forward(self, student: nn.Module, output, target: Tensor) -> dict[str, Tensor]:
        """The terms by name.

        Args:
            student: for its `align_corners`.
            output: what its `forward_features` gave.
            target: (N, H, W), 255 where ignored.
        """
        align_corners = getattr(student, "align_corners", False)
        terms = {"labels": self.loss(output.logits, target, align_corners)}
        if output.aux and self.aux_weight:
            terms["auxiliary"] = self.aux_weight * sum(self.loss(logits, target, align_corners) for logits in output.aux)
        return terms

    def loss(self, logits: Tensor, target: Tensor, align_corners: bool) -> Tensor:
        options = {"weight": self.class_weights, "ignore_index": IGNORED, "label_smoothing": self.label_smoothing}
        options["align_corners"] = align_corners
        labelled = target != IGNORED
        if not self.ohem:
            weight = labelled.sum().float() if self.class_weights is None else self.class_weights[target[labelled].long()].sum()
            return ops.upsample_cross_entropy(logits, target, reduction="sum", **options) / shared(weight)
        least = max(1, int(self.ohem_keep * labelled.sum()))
        options |= {"ohem_threshold": self.ohem, "ohem_min_kept": least}
        mean = ops.upsample_cross_entropy(logits, target, **options)
        if not distributed():
            return mean
        with torch.no_grad():
            weight = ops.upsample_cross_entropy(logits, target, reduction="sum", **options) / mean
        weight = torch.where(mean > 0, weight, 0.0)
        return mean * weight / shared(weight)


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def shared(weight: Tensor) -> Tensor:
    """The weight of all pixels that count, over the number of processes: gradients are averaged over these, and only with one
    weight for all is that the gradient of the whole batch. 1 in place of 0."""
    if distributed():
        dist.all_reduce(weight)
        weight /= dist.get_world_size()
    return torch.where(weight > 0, weight, 1.0)


def balanced_weights(pixels: Sequence[int]) -> list[float]:
    """Class weights 1 / ln(1.02 + share of the pixels) (ENet, arXiv:1606.02147, section 5.2), from pixel counts."""
    share = torch.tensor(pixels, dtype=torch.float64) / max(1, sum(pixels))
    return (1 / (1.02 + share).log()).tolist()
