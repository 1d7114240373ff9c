"""Structured Knowledge Distillation for Semantic Segmentation (Liu et al., arXiv:1903.04197): its losses as modules."""

from torch import Tensor, nn

from segfast import ops


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

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of feature maps (N, C, H, W) and (N, C', H, W)."""
        node_size, pool = self.node_size, self.pool
        if self.preset == "official":
            height, width = (max(1, int(size * self.scale)) for size in teacher.shape[-2:])
            node_size, pool = (height, width), "max"
        return ops.pairwise_loss(
            student, teacher, node_size=node_size, pool=pool, grid=self.grid, detach_norm=self.detach_norm, eps=self.eps
        )

    def extra_repr(self) -> str:
        if self.preset == "official":
            return f"preset='official', scale={self.scale}, detach_norm={self.detach_norm}, eps={self.eps}"
        return f"node_size={self.node_size}, pool={self.pool!r}, grid={self.grid}, detach_norm={self.detach_norm}, eps={self.eps}"
