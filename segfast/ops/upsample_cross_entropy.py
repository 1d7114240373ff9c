"""Cross-entropy at image size of logits at their own stride: the loss of every segmentation network."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from segfast import _backend
from segfast.ops.upsample_argmax import check_aligned, check_logits, upsample, wide_dtype

REDUCTIONS = ("none", "mean", "sum")


def upsample_cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 0,
    align_corners: bool = False,
    reduction: str = "mean",
) -> Tensor:
    x = upsample(logits, tuple(target.shape[1:]), align_corners, wide_dtype(logits))
    target = target.long()
    if weight is not None:
        weight = weight.detach().to(x.dtype)
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    loss = F.cross_entropy(x, target, **options)
    kept = target != ignore_index
    labels = torch.where(kept, target, 0)
    if ohem_threshold is not None:
        kept = kept & hard_pixels(x.detach(), labels, kept, ohem_threshold, ohem_min_kept)
        loss = loss * kept
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    share = kept.to(x.dtype) if weight is None else torch.where(kept, weight[labels], 0.0)
    return loss.sum() / torch.where(kept.any(), share.sum(), 1.0)


def hard_pixels(x: Tensor, labels: Tensor, valid: Tensor, threshold: float, min_kept: int) -> Tensor:
    probability = x.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1).nan_to_num(0.0)  # what is not a number is hard
    hard = probability < threshold
    if min_kept == 0 or probability.numel() == 0:
        return hard
    ranked = torch.where(valid, probability, torch.inf).flatten()
    return hard | (probability <= ranked.kthvalue(min(min_kept, ranked.numel())).values)


_OPTIONS = (
    "int ignore_index, float label_smoothing, float ohem_threshold, SymInt ohem_min_kept, bool align_corners, int reduction"
)
torch.library.define(
    "segfast::upsample_cross_entropy",
    f"(Tensor logits, Tensor target, Tensor? weight, {_OPTIONS}, bool gradient) -> (Tensor loss, Tensor saved, Tensor cut)",
)
torch.library.define(
    "segfast::upsample_cross_entropy_backward",
    f"(Tensor grad, Tensor logits, Tensor target, Tensor? weight, Tensor cut, {_OPTIONS}) -> Tensor",
)
_backend.register("upsample_cross_entropy", "upsample_cross_entropy_backward")


@torch.library.register_fake("segfast::upsample_cross_entropy")
def _(logits, target, weight, ignore_index, smoothing, threshold, min_kept, align_corners, reduction, gradient):
    dtype = wide_dtype(logits)
    none = REDUCTIONS[reduction] == "none"
    loss = logits.new_empty(tuple(target.shape) if none else (), dtype=dtype)
    saved = gradient_like(logits, dtype) if gradient and not none else logits.new_empty((0,), dtype=dtype)
    return loss, saved, logits.new_empty((), dtype=dtype)


@torch.library.register_fake("segfast::upsample_cross_entropy_backward")
def _(grad, logits, *args):
    return gradient_like(logits, logits.dtype)


@register_flop_formula([torch.ops.segfast.upsample_cross_entropy, torch.ops.segfast.upsample_cross_entropy_backward])
def _(*args, **kwargs) -> int:
    return 0  # like every softmax: no matrix product


def gradient_like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(logits, dtype=dtype, memory_format=_backend.layout(logits))


# A scalar loss leaves its gradient behind, at the logits' own size; a loss a pixel is computed again when its gradient comes.
class UpsampleCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, weight, witness, options):
        raw = torch.ops.segfast.upsample_cross_entropy.default
        loss, saved, cut = raw(logits, target, weight, *options, True)
        if REDUCTIONS[options[-1]] == "none":
            ctx.options = options
            ctx.save_for_backward(logits, target, weight, cut)
        else:
            ctx.dtype, ctx.options = logits.dtype, None
            ctx.save_for_backward(saved, witness)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if ctx.options is None:
            saved, witness = ctx.saved_tensors
            return _backend.once("upsample_cross_entropy", scaled, saved, witness, grad, ctx.dtype), None, None, None, None
        logits, target, weight, cut = ctx.saved_tensors
        raw = torch.ops.segfast.upsample_cross_entropy_backward.default
        grad_logits = _backend.once("upsample_cross_entropy", raw, grad, logits, target, weight, cut, *ctx.options)
        return grad_logits, None, None, None, None


def scaled(saved: Tensor, witness: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return (saved * grad).to(dtype)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 0,
    align_corners: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy, in nats, of labels at image size with logits at their own stride, interpolated bilinearly on the way.

    loss = F.cross_entropy(F.interpolate(logits, target's size, mode="bilinear"), target, ...)

    and its gradient; the interpolated logits, their softmax and their gradient are never stored. With `ohem_threshold` only hard
    pixels count (online hard example mining: Shrivastava et al., arXiv:1604.03540; of pixels: Wu et al., arXiv:1605.06885, sec.
    3.2): those whose true class has a probability below the threshold, and in any case the `ohem_min_kept` hardest of the batch,
    with all that are as hard as the last of them (pixels that are so but for rounding may fall on either side).

    Args:
        logits: (N, C, H, W), float, any strides; float16 and bfloat16 are computed in float32.
        target: (N, H', W'), integer: class numbers below C, or `ignore_index`. Larger or smaller than (H, W) by any ratio.
        ignore_index: the label of a pixel that does not count; may be negative.
        weight: (C,), float, of each class; has no gradient.
        label_smoothing: in [0, 1], as in `torch.nn.functional.cross_entropy`.
        ohem_threshold: a probability in (0, 1]; None: every labelled pixel counts.
        ohem_min_kept: at least so many pixels of the batch count, as far as there are labelled ones; needs `ohem_threshold`.
        align_corners: as in `torch.nn.functional.interpolate`.
        reduction: "mean" over the pixels that count, each with its class's weight, "sum", or "none".

    Returns:
        A scalar, or (N, H', W') with reduction="none" and 0 at pixels that do not count; float64 for float64 logits, else
        float32. 0, with zero gradients, where no pixel counts; a NaN among the logits is in the gradient anyway, as in eager.

    Raises:
        ValueError: not rank 4, no classes or pixels, a target of another batch, shape or device, a weight of another shape or
            device, label_smoothing, ohem_threshold or ohem_min_kept out of range, an unknown reduction.
        TypeError: logits or weight not of a real float dtype, target or ignore_index not integer, align_corners not bool.
        RuntimeError: a label outside the classes, with its value and position; on CUDA these are printed before a device
            assert ends the run. (The reference raises what F.cross_entropy does.)
    """
    check("upsample_cross_entropy", logits, target, weight)
    _backend.check_whole("upsample_cross_entropy", "ignore_index", ignore_index)
    check_aligned("upsample_cross_entropy", align_corners)
    check_options("upsample_cross_entropy", label_smoothing, ohem_threshold, ohem_min_kept, reduction)
    if not _backend.has_kernel("upsample_cross_entropy", logits, target):
        return upsample_cross_entropy_reference(
            logits, target, ignore_index=ignore_index, weight=weight, label_smoothing=label_smoothing,
            ohem_threshold=ohem_threshold, ohem_min_kept=ohem_min_kept, align_corners=align_corners, reduction=reduction,
        )  # fmt: skip
    if target.dtype not in (torch.uint8, torch.int32, torch.int64):
        target = target.long()
    if weight is not None:
        weight = weight.detach().to(wide_dtype(logits))
    options = (
        int(ignore_index), float(label_smoothing), float(ohem_threshold or 0), ohem_min_kept, bool(align_corners),
        REDUCTIONS.index(reduction),
    )  # fmt: skip
    if torch.is_grad_enabled() and logits.requires_grad:
        # An empty piece of the logits in the backward's arguments: by it a second derivative knows what the gradient depends on.
        return UpsampleCrossEntropy.apply(logits, target, weight, logits[:0].clone(), options)
    return torch.ops.segfast.upsample_cross_entropy.default(logits.detach(), target, weight, *options, False)[0]


def check(op: str, logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    check_logits(op, "logits", logits)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{op}: want target of an integer dtype, got {target.dtype}")
    if target.dim() != 3 or target.shape[0] != logits.shape[0] or 0 in target.shape[1:]:
        got = f"{tuple(target.shape)} for logits of shape {tuple(logits.shape)}"
        raise ValueError(f"{op}: want target of shape (N, H', W') with the logits' N and H' and W' > 0, got {got}")
    check_weight(op, weight)
    if weight is not None and tuple(weight.shape) != (logits.shape[1],):
        raise ValueError(f"{op}: want weight of shape (C,) = ({logits.shape[1]},), got {tuple(weight.shape)}")
    for name, x in (("target", target), ("weight", weight)):
        if x is not None and x.device != logits.device:
            raise ValueError(f"{op}: want {name} on the logits' device {logits.device}, got {x.device}")


def check_weight(op: str, weight: Tensor | None) -> None:
    got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
    if weight is not None and got not in _backend.DTYPES:
        raise TypeError(f"{op}: want weight a tensor of float32, float64, float16 or bfloat16, got {got}")


def check_options(op: str, label_smoothing: float, ohem_threshold: float | None, ohem_min_kept: int, reduction: str) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: want label_smoothing in [0, 1], got {label_smoothing}")
    if ohem_threshold is not None and not 0 < ohem_threshold <= 1:
        raise ValueError(f"{op}: want ohem_threshold None or in (0, 1], got {ohem_threshold}")
    if not _backend.is_whole(ohem_min_kept) or ohem_min_kept < 0 or (ohem_threshold is None and ohem_min_kept != 0):
        raise ValueError(
            f"{op}: want ohem_min_kept an int >= 0, and 0 without ohem_threshold, "
            f"got {ohem_min_kept} with threshold {ohem_threshold}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: want reduction {', '.join(REDUCTIONS)}, got {reduction!r}")
