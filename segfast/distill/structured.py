"""Structured Knowledge Distillation for Semantic Segmentation (Liu et al., arXiv:1903.04197): its losses as modules."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from segfast import ops
from segfast.distill._method import Batch, Term, average, register_term, resize, smaller
from segfast.distill._method import valid_pixels as cells
from segfast.distill._taps import Probe
from segfast.ops.pairwise_cosine import pool_nodes
from segfast.ops.pixelwise_kl import check_options, valid_pixels
from segfast.ops.upsample_argmax import check_size


class PairWiseLoss(nn.Module):
    """Pair-wise distillation of feature maps: `segfast.ops.pairwise_loss` as a module.

    loss = mean over n, i, j of (a_S[n, i, j] - a_T[n, i, j])^2,  a: cosine similarities of pooled nodes    (eq. 2 and 3)

    preset="paper" is that formula with the options below and the true gradient. preset="official" is the authors' released
    code: max-pooling with kernel = stride = (int(H scale), int(W scale)) of the teacher's map, ceil mode, and norms that are
    constants in the gradient; with scale=0.5 an even map has 2 x 2 nodes.

    Args:
        node_size, pool, grid, detach_norm, eps: as in `segfast.ops.pairwise_loss`; detach_norm=None takes the preset's own.
            With "official", node_size, pool and grid are the preset's and must be left alone.
        preset: "paper" or "official".
        scale: of "official" only, in (0, 1].

    Raises:
        ValueError: an unknown preset, an option that the preset sets itself, or a scale outside (0, 1].
    """

    def __init__(
        self,
        *,
        node_size: int | tuple[int, int] = 2,
        pool: str = "avg",
        grid: tuple[int, int] | None = None,
        detach_norm: bool | None = None,
        eps: float = 1e-8,
        preset: str = "paper",
        scale: float = 0.5,
    ) -> None:
        super().__init__()
        if preset not in ("paper", "official"):
            raise ValueError(f'PairWiseLoss: want preset "paper" or "official", got {preset!r}')
        if preset == "official" and (node_size, pool, grid) != (2, "avg", None):
            raise ValueError(
                f'PairWiseLoss: want node_size, pool and grid left alone with preset="official", '
                f"got node_size={node_size}, pool={pool!r}, grid={grid}"
            )
        if not 0 < scale <= 1:
            raise ValueError(f"PairWiseLoss: want scale in (0, 1], got {scale}")
        self.preset, self.scale = preset, scale
        self.node_size, self.pool, self.grid, self.eps = node_size, pool, grid, eps
        self.detach_norm = preset == "official" if detach_norm is None else detach_norm

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of feature maps (N, C, H, W) and (N, C', H, W); the mean over nodes with a pixel where `mask` (N, H, W) holds.

        Both maps are taken for 0 elsewhere: a vector of zeros resembles nothing.
        """
        node_size, pool = self.node_size, self.pool
        if self.preset == "official":
            height, width = (max(1, int(size * self.scale)) for size in teacher.shape[-2:])
            node_size, pool = (height, width), "max"
        if mask is not None:
            student, teacher = (torch.where(mask.unsqueeze(1), x, 0) for x in (student, teacher))
        loss = ops.pairwise_loss(
            student, teacher, node_size=node_size, pool=pool, grid=self.grid, detach_norm=self.detach_norm, eps=self.eps
        )
        if mask is None:
            return loss
        nodes = pool_nodes(mask.unsqueeze(1).float(), node_size, "max", self.grid).flatten(1)
        return loss * (nodes.numel() * nodes.shape[1]) / nodes.sum(1).square().sum().clamp(min=1)

    def extra_repr(self) -> str:
        if self.preset == "official":
            return f"preset='official', scale={self.scale}, detach_norm={self.detach_norm}, eps={self.eps}"
        return f"node_size={self.node_size}, pool={self.pool!r}, grid={self.grid}, detach_norm={self.detach_norm}, eps={self.eps}"


class PixelWiseLoss(nn.Module):
    """Pixel-wise distillation of logits: `segfast.ops.pixelwise_kl` as a module.

    preset="paper": T^2 KL(teacher || student), the mean over the valid pixels of all images (eq. 1, its text and the common use:
    the formula as surveys quote it has the arguments of KL the other way round). preset="official" is the authors' released
    code: the cross-entropy -sum_c p_T log p_S, summed over images and pixels and divided by W and H. It has the gradient of the
    divergence, its value is greater by the teacher's entropy.

    Args:
        temperature, ignore_index, reduction: as in `segfast.ops.pixelwise_kl`. With "official", temperature and reduction are
            the preset's and must be left alone.
        preset: "paper" or "official".
        size: (H, W), or an int for both, to which student and teacher, at strides of their own, are interpolated bilinearly on
            the way (`segfast.ops.upsample_pixelwise_kl`); None: both have one size already.
        align_corners: of the interpolation.

    Raises:
        ValueError: an unknown preset, an option that the preset sets itself, and what `segfast.ops.pixelwise_kl` raises.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        ignore_index: int = 255,
        reduction: str = "mean",
        preset: str = "paper",
        size: int | tuple[int, int] | None = None,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if preset not in ("paper", "official"):
            raise ValueError(f'PixelWiseLoss: want preset "paper" or "official", got {preset!r}')
        if preset == "official" and (temperature, reduction) != (1.0, "mean"):
            raise ValueError(
                f'PixelWiseLoss: want temperature and reduction left alone with preset="official", '
                f"got temperature={temperature}, reduction={reduction!r}"
            )
        check_options("PixelWiseLoss", temperature, reduction)
        self.temperature, self.ignore_index, self.reduction, self.preset = temperature, ignore_index, reduction, preset
        self.size, self.align_corners = None if size is None else check_size("PixelWiseLoss", size), align_corners

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The loss of logits (N, C, H, W); `target` and `mask` (N, H, W), of `size` if set, say which pixels count."""
        options = {"target": target, "ignore_index": self.ignore_index, "mask": mask}
        divergence_of = ops.pixelwise_kl
        if self.size is not None:
            divergence_of = partial(ops.upsample_pixelwise_kl, size=self.size, align_corners=self.align_corners)
        if self.preset == "paper":
            return divergence_of(student, teacher, temperature=self.temperature, reduction=self.reduction, **options)
        divergence = divergence_of(student, teacher, reduction="sum", **options)
        entropy = divergence_of(torch.zeros_like(teacher), teacher, reduction="none", **options)
        valid = valid_pixels(target, self.ignore_index, mask)
        pixels = entropy.numel() if valid is None else valid.sum()
        return (divergence + pixels * math.log(teacher.shape[1]) - entropy.sum()) / entropy.shape[2] / entropy.shape[1]

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"preset={self.preset!r}" + (f", size={self.size}, align_corners={self.align_corners}" if self.size else "")
        )


class SelfAttention(nn.Module):
    """x + gamma attention(x) over locations, gamma from 0 (Zhang et al., Self-Attention GAN, arXiv:1805.08318)."""

    def __init__(self, channels: int):
        super().__init__()
        inner = max(1, channels // 8)
        self.query, self.key = (spectral_norm(nn.Conv2d(channels, inner, 1)) for _ in range(2))
        self.value = spectral_norm(nn.Conv2d(channels, channels, 1))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        # Products written out: the fused attention of PyTorch has no second derivative, which the gradient penalty needs.
        query, key, value = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        weight = torch.bmm(query.transpose(1, 2), key).softmax(2)
        return x + self.gamma * torch.bmm(value, weight.transpose(1, 2)).view_as(x)


class Critic(nn.Module):
    """The Wasserstein critic of holistic distillation: how much a score map looks like a teacher's, given the image.

    Four 4x4 convolutions of stride 2 with spectral norm and LeakyReLU 0.1, channels doubling, self-attention after the last two,
    and a 4x4 convolution to one number, averaged over what is left of the map. Maps of any size: where one is too small for a
    kernel, zeros are put around it. (Liu et al., arXiv:1903.04197)

    Args:
        num_classes: of the score maps.
        channels: of the first convolution.
        image_channels: of the image that is the condition; 0: none, as in the released code.
        norm: of the input. "sample" (GroupNorm, image and scores each as one group): independent of the other images of a batch,
            which the gradient penalty, defined for one image, takes for granted. "batch": BatchNorm, as in the released code.

    Raises:
        ValueError: an unknown norm.
    """

    def __init__(self, num_classes: int, channels: int = 64, image_channels: int = 3, norm: str = "sample"):
        super().__init__()
        if norm not in ("sample", "batch"):
            raise ValueError(f'Critic: want norm "sample" or "batch", got {norm!r}')
        kind = nn.BatchNorm2d if norm == "batch" else lambda number: nn.GroupNorm(1, number)
        self.score_norm = kind(num_classes)
        self.image_norm = kind(image_channels) if image_channels else None
        widths = (num_classes + image_channels, *(channels * 2**i for i in range(4)))
        self.convs = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 4, 2, 1)) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList((SelfAttention(widths[3]), SelfAttention(widths[4])))
        self.last = nn.Conv2d(widths[4], 1, 4)

    def forward(self, scores: Tensor, images: Tensor | None = None) -> Tensor:
        """(N,) for score maps (N, num_classes, h, w) and images (N, image_channels, H, W), which are brought to h x w."""
        x = self.score_norm(scores)
        if self.image_norm is not None:
            x = torch.cat((self.image_norm(resize(images, scores.shape[2:])), x), 1)
        for i, conv in enumerate(self.convs):
            x = F.leaky_relu(conv(at_least(x, 2)), 0.1)
            if i >= 2:
                x = self.attentions[i - 2](x)
        return self.last(at_least(x, 4)).mean((1, 2, 3))


def at_least(x: Tensor, size: int) -> Tensor:
    missing = [max(0, size - side) for side in (x.shape[3], x.shape[2])]
    if not any(missing):
        return x
    return F.pad(x, [part for total in missing for part in (total // 2, total - total // 2)])


def gradient_penalty(
    critic: nn.Module, real: Tensor, fake: Tensor, images: Tensor | None = None, *, mix: Tensor | None = None, eps: float = 1e-12
) -> Tensor:
    """How far the critic is from slope 1 between teacher and student: the mean over images of (|grad| - 1)^2.

    grad = d critic(x) / dx at x = mix real + (1 - mix) fake,  |grad| = sqrt(sum grad^2 + eps)
    (Gulrajani et al., Improved Training of Wasserstein GANs, arXiv:1704.00028, eq. 3; without eps a slope of 0 makes it NaN)

    Args:
        real, fake: (N, C, h, w) score maps of teacher and student; no gradient goes to them.
        mix: (N,), in [0, 1]; None: drawn evenly.
        eps: inside the root.
    """
    mix = torch.rand(real.shape[0], device=real.device, dtype=real.dtype) if mix is None else mix
    mix = mix.view(-1, 1, 1, 1)
    x = (mix * real.detach() + (1 - mix) * fake.detach()).requires_grad_()
    (grad,) = torch.autograd.grad(critic(x, images).sum(), x, create_graph=True)
    return ((grad.square().sum((1, 2, 3)) + eps).sqrt() - 1).square().mean()


class Holistic(Term):
    """The term "holistic" of a method: -weight mean critic(student's scores, image), and the critic's own training.

    The critic's step (`extra_step`, after the student's) minimises
    mean critic(student's) - mean critic(teacher's) + penalty * gradient_penalty
    on the latest batch. Score maps are logits at the student's size, 0 at ignored pixels. All of it is float32.

    Args:
        critic: trained here; frozen for everybody else.
        weight: of the student's term; the paper's 0.1.
        penalty: of the gradient penalty; 10.
        lr: of the critic's optimiser; 4e-4.
        momentum, weight_decay: of SGD, the released code's 0.9 and 1e-4.
        optimizer: "sgd" or "adam" (with betas 0 and 0.9).
        steps: of the critic for one of the student.
        ignore_index: None: ignored pixels count.
    """

    def __init__(
        self,
        critic: Critic,
        *,
        weight: float = 0.1,
        penalty: float = 10.0,
        lr: float = 4e-4,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        optimizer: str = "sgd",
        steps: int = 1,
        ignore_index: int | None = 255,
    ):
        super().__init__()
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f'holistic: want optimizer "sgd" or "adam", got {optimizer!r}')
        self.critic = critic.requires_grad_(False)
        self.weight, self.penalty, self.steps, self.ignore_index = weight, penalty, steps, ignore_index
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(critic.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        else:
            self.optimizer = torch.optim.Adam(critic.parameters(), lr=lr, betas=(0.0, 0.9), weight_decay=weight_decay)
        self.latest: tuple[Tensor, Tensor, Tensor] | None = None

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"critic": self.optimizer}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        fake = batch.student.logits.float()
        real = resize(batch.teacher.logits.float(), fake.shape[2:])
        images = batch.images.float()
        mask = None if self.ignore_index is None else cells(batch.target, fake.shape[2:], self.ignore_index)
        if mask is not None:
            fake, real = (torch.where(mask.unsqueeze(1), x, 0) for x in (fake, real))
        # PyTorch 2.13 crashes in the penalty's double backward on the CPU where maps are channels_last.
        real, fake, images = (x.contiguous() for x in (real, fake, images))
        self.latest = real.detach(), fake.detach(), images
        with torch.autocast(fake.device.type, enabled=False):
            return {"holistic": -self.weight * self.critic(fake, images).mean()}

    def extra_step(self) -> dict[str, Tensor]:
        if self.latest is None:
            return {}
        real, fake, images = self.latest
        parameters = list(self.critic.parameters())
        values: dict[str, Tensor] = {}
        with unfrozen(self.critic), torch.enable_grad(), torch.autocast(fake.device.type, enabled=False):
            for _ in range(self.steps):
                distance = self.critic(fake, images).mean() - self.critic(real, images).mean()
                penalty = self.penalty * gradient_penalty(self.critic, real, fake, images)
                self.optimizer.zero_grad(set_to_none=True)
                (distance + penalty).backward()
                average([p for p in parameters if p.grad is not None])
                self.optimizer.step()
                values = {"critic": distance.detach(), "gradient penalty": penalty.detach()}
            self.optimizer.zero_grad(set_to_none=True)
        self.latest = None
        return values


@contextlib.contextmanager
def unfrozen(module: nn.Module) -> Iterator[None]:
    module.requires_grad_(True)
    try:
        yield
    finally:
        module.requires_grad_(False)


class PixelWise(Term):
    """The term "pixel-wise" of a method: `PixelWiseLoss` of the logits, the teacher's at the student's size.

    Args:
        weight: of the term; the paper's 10.
        temperature: as in `PixelWiseLoss`.
        preset, ignore_index: as in `PixelWiseLoss`; "official" counts ignored pixels too, as the released code does.
        class_weights: a factor a class, of preset "paper": the mean over pixels is weighted, with the factor that a pixel has in
            the mean over the teacher's class distribution. A student whose cross-entropy has class weights needs them here too:
            of an equal mean, the common classes push its rare ones out. None: an equal mean.

    Raises:
        ValueError: class weights with preset "official", or not one, positive and finite, a class.
    """

    def __init__(
        self,
        *,
        weight: float = 10.0,
        temperature: float = 1.0,
        preset: str = "paper",
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        if class_weights is not None:
            if preset != "paper":
                raise ValueError(f'pixel-wise: want class_weights with preset="paper" alone, got {preset!r}')
            if not all(0 < factor < math.inf for factor in class_weights):
                raise ValueError(f"pixel-wise: want class_weights > 0 and finite, got {list(class_weights)}")
            class_weights = torch.tensor(class_weights, dtype=torch.float32)
        self.weight, self.ignore_index, self.masked = weight, ignore_index, preset == "paper"
        reduction = "mean" if class_weights is None else "none"
        self.loss = PixelWiseLoss(temperature=temperature, ignore_index=ignore_index, preset=preset, reduction=reduction)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        student = batch.student.logits
        teacher = resize(batch.teacher.logits, student.shape[2:])
        mask = cells(batch.target, student.shape[2:], self.ignore_index) if self.masked else None
        loss = self.loss(student, teacher, mask=mask)
        if self.class_weights is not None:
            if len(self.class_weights) != teacher.shape[1]:
                raise ValueError(f"pixel-wise: want {teacher.shape[1]} class_weights, got {len(self.class_weights)}")
            pixels = torch.einsum("c,nchw->nhw", self.class_weights, teacher.detach().float().softmax(1))
            if mask is not None:
                pixels = pixels * mask
            loss = (loss * pixels).sum() / pixels.sum().clamp(min=self.class_weights.min())
        return {"pixel-wise": self.weight * loss}


class PairWise(Term):
    """The term "pair-wise" of a method: `PairWiseLoss` of the maps before the classifiers, both at the smaller one's size.

    Args:
        weight: of the term; the paper's 10, the released code's 0.5.
        taps: (student's, teacher's) instead of the maps that the classifiers read.
        node_size, pool, grid, eps, preset, scale: as in `PairWiseLoss`.
        ignore_index: nodes without a labelled pixel are left out, with preset="official" as the released code does not.
    """

    def __init__(
        self,
        *,
        weight: float = 10.0,
        taps: tuple[str, str] = ("pre_logits", "pre_logits"),
        preset: str = "paper",
        ignore_index: int = 255,
        **options,
    ):
        super().__init__()
        self.weight, self.ignore_index, self.masked = weight, ignore_index, preset == "paper"
        self.student_taps, self.teacher_taps = [taps[0]], [taps[1]]
        self.reads_teacher = False
        self.loss = PairWiseLoss(preset=preset, **options)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        student, teacher = smaller(batch.student_maps[0], batch.teacher_maps[0])
        mask = cells(batch.target, student.shape[2:], self.ignore_index) if self.masked else None
        return {"pair-wise": self.weight * self.loss(student, teacher, mask)}


@register_term("pixel-wise", "structured")
def pixel_wise(
    student, teacher, preset, ignore_index, weight: float = 10.0, temperature: float = 1.0,
    class_weights: Sequence[float] | None = None,
) -> Term:  # fmt: skip
    """The pixel-wise term of Structured Knowledge Distillation."""
    options = {"weight": weight, "temperature": temperature, "class_weights": class_weights}
    return PixelWise(preset=preset, ignore_index=ignore_index, **options)


@register_term("pair-wise", "structured")
def pair_wise(
    student, teacher, preset, ignore_index, weight: float | None = None, taps: tuple[str, str] = ("pre_logits", "pre_logits"),
    node_size=2, pool: str = "avg", grid=None, eps: float = 1e-8, scale: float = 0.5,
) -> Term:  # fmt: skip
    """The pair-wise term of Structured Knowledge Distillation."""
    weight = weight if weight is not None else 0.5 if preset == "official" else 10.0
    options = {"node_size": node_size, "pool": pool, "grid": grid, "eps": eps, "scale": scale}
    return PairWise(weight=weight, taps=taps, preset=preset, ignore_index=ignore_index, **options)


@register_term("holistic", "structured")
def holistic(
    student, teacher, preset, ignore_index, weight: float = 0.1, penalty: float = 10.0, lr: float = 4e-4, momentum: float = 0.9,
    weight_decay: float = 1e-4, optimizer: str = "sgd", steps: int = 1, channels: int = 64, num_classes: int | None = None,
) -> Term:  # fmt: skip
    """The holistic term of Structured Knowledge Distillation; `num_classes` None: probed.

    preset="official": a critic of the scores alone, with BatchNorm, as in the released code, and ignored pixels count.
    """
    official = preset == "official"
    number = num_classes or Probe(student).output.logits.shape[1]
    critic = Critic(number, channels, 0 if official else 3, "batch" if official else "sample")
    return Holistic(
        critic,
        weight=weight,
        penalty=penalty,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        optimizer=optimizer,
        steps=steps,
        ignore_index=None if official else ignore_index,
    )
