"""Knowledge Adaptation for Efficient Semantic Segmentation (He et al., arXiv:1903.04688): the teacher's features, re-encoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast.distill._method import Batch, Term, read, register_term, resize, valid_pixels
from segfast.distill._taps import Probe, Tap, Taps, run
from segfast.distill.structured import PairWiseLoss


class AutoEncoder(nn.Module):
    """Three 3x3 convolutions down to the code and three transposed ones back, each with BatchNorm and ReLU but the last.

    Args:
        channels: of the teacher's map.
        latent_channels: of the code.
        strides: of the convolutions; their product is what a side of the code is shorter by.
    """

    def __init__(self, channels: int, latent_channels: int, strides: Sequence[int] = (1, 1, 1)):
        super().__init__()
        self.channels, self.latent_channels, self.strides = channels, latent_channels, tuple(strides)
        widths = (channels, *[latent_channels] * len(strides))
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, stride in zip(widths, widths[1:], strides)
        )
        self.decoders = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 3, stride, 1, bias=i == 0)
            for i, (a, b, stride) in enumerate(zip(widths, widths[1:], strides))
        )
        self.norms = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(a), nn.ReLU()) for a in widths[1:-1])

    def encode(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to the code (N, latent_channels, h, w)."""
        for encoder in self.encoders:
            x = encoder(x)
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, channels, H, W) to the code and the map that it is decoded to."""
        sizes = []
        code = x
        for encoder in self.encoders:
            sizes.append(code.shape[2:])
            code = encoder(code)
        y = code
        for i in reversed(range(len(self.decoders))):
            y = self.decoders[i](y, output_size=sizes[i])
            y = self.norms[i - 1](y) if i else y
        return code, y


def autoencoder_loss(x: Tensor, code: Tensor, decoded: Tensor, alpha: float) -> dict[str, Tensor]:
    """mean (x - decoded)^2 and alpha mean |code|: the paper's, with means for sums so that sizes do not matter."""
    return {"reconstruction": (decoded - x).square().mean(), "sparsity": alpha * code.abs().mean()}


def train_autoencoder(
    teacher: nn.Module,
    loader: Iterable,
    *,
    autoencoder: AutoEncoder | None = None,
    tap: str = "pre_logits",
    steps: int | None = None,
    lr: float = 0.1,
    weight_decay: float = 1e-3,
    alpha: float = 1e-6,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> AutoEncoder:
    """The first step of knowledge adaptation: an auto-encoder of a frozen teacher's map, trained by SGD with momentum 0.9.

    Args:
        teacher: put into evaluation mode.
        loader: gives batches whose first element is images (N, 3, H, W), on the teacher's device; iterated again when it ends.
        autoencoder: trained in place; None: one with half of the map's channels and no strides.
        tap: key of the teacher's features or module path.
        steps: optimiser steps; None: once through the loader.
        lr: peak of the learning rate, which a cosine takes to 0 where `steps` says when.
        weight_decay: of every parameter.
        alpha: weight of the code's mean absolute value.
        progress: called after every step with the steps done and the loss's terms.

    Returns:
        The auto-encoder, in evaluation mode.

    Raises:
        ValueError: the loader gives nothing.
        FloatingPointError: the loss is not finite.
    """
    teacher.eval()
    device = next(teacher.parameters()).device
    if autoencoder is None:
        channels = Probe(teacher).tap(tap).channels
        autoencoder = AutoEncoder(channels, max(1, channels // 2))
    autoencoder.to(device).train().requires_grad_(True)
    optimizer = torch.optim.SGD(autoencoder.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if steps else None
    taps = Taps(teacher, [tap])
    done, batches = 0, iter(loader)
    try:
        while steps is None or done < steps:
            batch = next(batches, None)
            if batch is None:
                if steps is None and done:
                    break
                batches = iter(loader)
                batch = next(batches, None)
                if batch is None:
                    raise ValueError("train_autoencoder: want a loader that gives batches, got none")
            with torch.no_grad():
                images = batch[0].to(device)
                x = taps.take(run(teacher, images))[tap].float()
            code, decoded = autoencoder(x)
            terms = autoencoder_loss(x, code, decoded, alpha)
            optimizer.zero_grad(set_to_none=True)
            sum(terms.values()).backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            done += 1
            values = read(terms, True)
            if not sum(values.values()) < float("inf"):
                raise FloatingPointError(f"train_autoencoder: the loss is {values} after step {done}: lower lr, which is {lr}")
            if progress:
                progress(done, values)
    finally:
        taps.close()
        optimizer.zero_grad(set_to_none=True)
    return autoencoder.eval().requires_grad_(False)


class Adaptation(Term):
    """The term "adaptation" of a method: the student's map, adapted, learns the code of the teacher's, and its affinities.

    adapt = mean |A / ||A|| - E / ||E|||,  A: 3x3 convolution + BatchNorm + ReLU of the student's map, E: the teacher's code;
        ||.||: the L2 norm of an image's whole map, so p = 1 and q = 2 in the paper's terms
    affinity = mean over n, i, j of (cos(A_i, A_j) - cos(E_i, E_j))^2 over the locations i, j

    The student's map is brought to the code's size before it is adapted. The affinities go through `segfast.ops.pairwise_loss`,
    which forms no matrix of locations x locations.

    Args:
        student, teacher: taps.
        autoencoder: trained, or None: then `prepare` trains one.
        latent_channels, strides: of the auto-encoder that `prepare` trains.
        adapt_weight, affinity_weight: beta and gamma.
        training: options of `train_autoencoder` for `prepare`.
        ignore_index: locations with this label count as vectors of zeros.
    """

    reads_teacher = False

    def __init__(
        self,
        student: Tap,
        teacher: Tap,
        *,
        autoencoder: AutoEncoder | None,
        latent_channels: int,
        strides: Sequence[int],
        adapt_weight: float,
        affinity_weight: float,
        training: dict,
        ignore_index: int = 255,
    ):
        super().__init__()
        self.student_taps, self.teacher_taps = [student.path], [teacher.path]
        self.register_buffer("trained", torch.tensor(autoencoder is not None))
        self.autoencoder = autoencoder or AutoEncoder(teacher.channels, latent_channels, strides)
        self.autoencoder.requires_grad_(False)
        self.ready = autoencoder is not None
        latent = self.autoencoder.latent_channels
        self.adapter = nn.Sequential(
            nn.Conv2d(student.channels, latent, 3, padding=1, bias=False), nn.BatchNorm2d(latent), nn.ReLU()
        )
        self.affinity = PairWiseLoss(node_size=1)
        self.adapt_weight, self.affinity_weight = adapt_weight, affinity_weight
        self.training_options, self.ignore_index = training, ignore_index

    def train(self, mode: bool = True) -> Adaptation:
        super().train(mode)
        self.autoencoder.eval()
        return self

    def prepare(self, teacher: nn.Module, loader: Iterable, progress) -> None:
        if bool(self.trained):
            return
        train_autoencoder(
            teacher, loader, autoencoder=self.autoencoder, tap=self.teacher_taps[0], progress=progress, **self.training_options
        )
        self.trained.fill_(True)
        self.ready = True

    def _load_from_state_dict(self, state, prefix, *rest) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        self.ready = bool(self.trained)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if not self.ready:
            raise RuntimeError("adaptation: want a trained auto-encoder: call method.prepare(loader), or give autoencoder=")
        device = batch.images.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            code = self.autoencoder.encode(batch.teacher_maps[0].float())
        adapted = self.adapter(resize(batch.student_maps[0], code.shape[2:])).float()
        mask = valid_pixels(batch.target, code.shape[2:], self.ignore_index)
        a, e = (x if mask is None else torch.where(mask.unsqueeze(1), x, 0) for x in (adapted, code))
        a, e = (F.normalize(x.flatten(1), eps=1e-6) for x in (a, e))
        return {
            "adapt": self.adapt_weight * (a - e).abs().mean(),
            "affinity": self.affinity_weight * self.affinity(adapted, code, mask),
        }


@register_term("adaptation")
def adaptation(
    student: nn.Module,
    teacher: nn.Module,
    preset: str,
    ignore_index: int,
    adapt_weight: float = 50.0,
    affinity_weight: float = 1.0,
    taps: tuple[str, str] = ("pre_logits", "pre_logits"),
    autoencoder: AutoEncoder | None = None,
    latent_channels: int | None = None,
    strides: Sequence[int] | None = None,
    steps: int | None = None,
    lr: float = 0.1,
    weight_decay: float = 1e-3,
    alpha: float = 1e-6,
    size: tuple[int, int] = (128, 128),
) -> Term:
    """The term "adaptation".

    Args:
        adapt_weight, affinity_weight: the paper's 50 and 1.
        taps: (student's, teacher's).
        autoencoder: a trained one; None: `Method.prepare` trains it.
        latent_channels: of the code; None: half of the teacher's.
        strides: of the auto-encoder's three convolutions; None: what brings the teacher's map to the student's stride.
        steps, lr, weight_decay, alpha: of its training, as in `train_autoencoder`.
        size: height and width of the images with which the networks are probed.
    """
    from_student, from_teacher = (Probe(network, size).tap(path) for network, path in zip((student, teacher), taps))
    if strides is None:
        halvings = min(3, max(0, round(math.log2(from_student.stride / from_teacher.stride))))
        strides = [2] * halvings + [1] * (3 - halvings)
    return Adaptation(
        from_student,
        from_teacher,
        autoencoder=autoencoder,
        latent_channels=latent_channels or max(1, from_teacher.channels // 2),
        strides=strides,
        adapt_weight=adapt_weight,
        affinity_weight=affinity_weight,
        training={"steps": steps, "lr": lr, "weight_decay": weight_decay, "alpha": alpha},
        ignore_index=ignore_index,
    )
