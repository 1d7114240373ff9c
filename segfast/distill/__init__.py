"""Stand-in until the fused losses land."""

import torch.nn.functional as F
from torch import nn


class PixelWiseLoss(nn.Module):
    def __init__(self, *, temperature=1.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student, teacher, target=None):
        s, t = ((x / self.temperature).log_softmax(1) for x in (student, teacher))
        return self.temperature**2 * F.kl_div(s, t, log_target=True, reduction="none").sum(1).mean()


class PairWiseLoss(nn.Module):
    def __init__(self, *, node_size=2):
        super().__init__()
        self.node_size = node_size

    def forward(self, student, teacher):
        def cosine(x):
            x = F.normalize(F.avg_pool2d(x, self.node_size, ceil_mode=True).flatten(2), dim=1)
            return x.transpose(1, 2) @ x

        return (cosine(student) - cosine(teacher)).square().mean()
