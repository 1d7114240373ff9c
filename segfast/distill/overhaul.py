"""A Comprehensive Overhaul of Feature Distillation (Heo et al., arXiv:1904.01866): maps before the activation, behind margins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segfast import ops
from segfast.distill._method import Batch, Term, register_term, resize, valid_pixels
from segfast.distill._taps import Probe, Tap, find_taps, module_at, pair_taps

OFFICIAL_DIVIDERS = (8, 4, 2, 1, 1, 16)  # of the released segmentation code: four stages, the pyramid, the decoder


def margins(norm: nn.Module) -> Tensor:
    """(C,), float64: what the negative outputs of a BatchNorm are on average, were its normalised inputs Gaussian.

    m = E[x | x < 0],  x ~ N(beta, s^2),  s = |gamma|:  m = beta - s phi(beta / s) / Phi(-beta / s)
    where Phi(-beta / s) > 0.001; else, hardly a value being negative, m = -3 s, as in the authors' code.
    (arXiv:1904.01866)

    Args:
        norm: with `num_features` channels; without affine parameters beta is 0 and gamma 1.
    """
    if norm.weight is None:
        s, beta = torch.ones(norm.num_features, dtype=torch.float64), torch.zeros(norm.num_features, dtype=torch.float64)
    else:
        s, beta = norm.weight.detach().double().abs(), norm.bias.detach().double()
    z = beta / s.clamp(min=torch.finfo(torch.float64).tiny)
    negative = torch.special.erfc(z / math.sqrt(2)) / 2
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    m = torch.where(negative > 1e-3, beta - s * density / negative, -3 * s)
    return torch.where(s == 0, beta.clamp(max=0), m)


def mean_negative(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(C,): the mean of the negative values of every channel of a map (N, C, H, W) within `mask` (N, H, W); 0 where none is."""
    x = x.float()
    counted = x < 0 if mask is None else (x < 0) & mask[:, None]
    return torch.where(counted, x, 0.0).sum((0, 2, 3)) / counted.sum((0, 2, 3)).clamp(min=1)


class Overhaul(Term):
    """The term "overhaul" of a method: `segfast.ops.overhaul_loss` of maps before the activation, a regressor for each.

    A student's map goes through its regressor, a 1x1 convolution to the teacher's channels and a BatchNorm, and is brought to
    the teacher's size. The teacher's BatchNorms take the batch's statistics, which table 8 of the paper finds better; their
    running ones stay as they are.

    Args:
        pairs: (student's, teacher's) taps.
        norms: the teacher's BatchNorms of the taps, for the margins; where None stands, the margins are the means of the
            negative values of each batch.
        weight: of the term.
        dividers: of the taps.
        reduction: as in `segfast.ops.overhaul_loss`.
        batch_statistics: of the teacher's BatchNorms.
        ignore_index: positions with this label are left out; None: none are.
    """

    reads_teacher = False

    def __init__(
        self,
        pairs: Sequence[tuple[Tap, Tap]],
        norms: Sequence[nn.Module | None],
        *,
        weight: float,
        dividers: Sequence[float],
        reduction: str = "mean",
        batch_statistics: bool = True,
        ignore_index: int | None = 255,
    ):
        super().__init__()
        self.student_taps, self.teacher_taps = [s.path for s, _ in pairs], [t.path for _, t in pairs]
        self.weight, self.dividers, self.reduction = weight, tuple(dividers), reduction
        self.batch_statistics, self.ignore_index = batch_statistics, ignore_index
        self.regressors = nn.ModuleList(regressor(s.channels, t.channels) for s, t in pairs)
        for i, norm in enumerate(norms):
            self.register_buffer(f"margin{i}", None if norm is None else margins(norm).float())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        total = 0
        for i, (student, teacher) in enumerate(zip(batch.student_maps, batch.teacher_maps)):
            mapped = resize(self.regressors[i](student), teacher.shape[2:])
            margin = getattr(self, f"margin{i}")
            mask = None if self.ignore_index is None else valid_pixels(batch.target, teacher.shape[2:], self.ignore_index)
            loss = ops.overhaul_loss(
                mapped, teacher, mean_negative(teacher, mask) if margin is None else margin, mask=mask, reduction=self.reduction
            )
            total = total + loss / self.dividers[i]
        return {"overhaul": self.weight * total}


def regressor(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


@register_term("overhaul")
def overhaul(
    student: nn.Module,
    teacher: nn.Module,
    preset: str,
    ignore_index: int,
    weight: float | None = None,
    taps: Sequence[tuple[str, str]] | None = None,
    teacher_bn: str = "batch",
    size: tuple[int, int] = (128, 128),
) -> Term:
    """The term "overhaul".

    preset="paper": weight 5, the mean over the elements of every map, so that neither image size nor batch size matter. The
    paper leaves the scale open. preset="official" is the released segmentation code's: 1e-5 times the sum over an image, over
    8, 4, 2, 1, 1 and 16 for six taps, over 2^(taps - 1 - i) for another number; ignored pixels count. At its crops of 513 that
    is 3 to 6 times the mean for all maps but the last stage's, hence the 5.

    Args:
        weight: of the term.
        taps: (student's, teacher's) module paths; None: `find_taps` of both, paired by `pair_taps`. Of an activation its input is
            taken, of any other module its output.
        teacher_bn: "batch" or "running" statistics.
        size: height and width of the images with which the networks are probed.
    """
    if teacher_bn not in ("batch", "running"):
        raise ValueError(f'overhaul: want teacher_bn "batch" or "running", got {teacher_bn!r}')
    if taps is None:
        pairs = pair_taps(find_taps(student, size), find_taps(teacher, size))
    else:
        probes = Probe(student, size), Probe(teacher, size)
        pairs = [tuple(probe.tap(path) for probe, path in zip(probes, pair)) for pair in taps]
    number = len(pairs)
    dividers = (1.0,) * number
    if preset == "official":
        dividers = OFFICIAL_DIVIDERS if number == 6 else tuple(2.0 ** (number - 1 - i) for i in range(number))
    default = 1e-5 if preset == "official" else 5.0
    return Overhaul(
        pairs,
        [None if t.norm is None else module_at(teacher, t.norm) for _, t in pairs],
        weight=default if weight is None else weight,
        dividers=dividers,
        reduction="batchmean" if preset == "official" else "mean",
        batch_statistics=teacher_bn == "batch",
        ignore_index=None if preset == "official" else ignore_index,
    )
