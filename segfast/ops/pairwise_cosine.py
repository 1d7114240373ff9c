"""Cosine similarities of all node pairs of a feature map."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from segfast import _backend

EPS = 1e-8


def check_features(op: str, *tensors: Tensor) -> None:
    for x in tensors:
        if x.dim() != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{op}: want (N, C, H, W) with C, H, W >= 1, got {tuple(x.shape)}")
        if x.dtype not in _backend.DTYPES:
            raise TypeError(f"{op}: want float32, float64, float16 or bfloat16, got {x.dtype}")


def check_pooling(op: str, node_size: int | tuple[int, int], pool: str, grid: tuple[int, int] | None) -> None:
    if pool not in ("avg", "max"):
        raise ValueError(f'{op}: want pool "avg" or "max", got {pool!r}')
    if grid is not None:
        if not isinstance(grid, (tuple, list)) or len(grid) != 2 or any(isinstance(g, float) or g < 1 for g in grid):
            raise ValueError(f"{op}: want grid = (rows, columns), integers >= 1, got {grid}")
        return
    sizes = node_size if isinstance(node_size, (tuple, list)) else (node_size, node_size)
    if len(sizes) != 2 or any(isinstance(size, float) or size < 1 for size in sizes):
        raise ValueError(f"{op}: want node_size an integer >= 1 or a pair of them, got {node_size}")


def pool_nodes(x: Tensor, node_size: int | tuple[int, int], pool: str, grid: tuple[int, int] | None) -> Tensor:
    """The nodes of a feature map, (N, C, M)."""
    sizes = tuple(node_size) if isinstance(node_size, (tuple, list)) else (node_size, node_size)
    if grid is not None:
        x = (F.adaptive_avg_pool2d if pool == "avg" else F.adaptive_max_pool2d)(x, tuple(grid))
    elif sizes != (1, 1):
        x = (F.avg_pool2d if pool == "avg" else F.max_pool2d)(x, sizes, ceil_mode=True)
    return x.flatten(2)


def unit_vectors(x: Tensor, eps: float, detach_norm: bool = False) -> Tensor:
    """(N, C, M) over the norm of each node, in float32 or better; a zero vector stays zero and gets no gradient."""
    x = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    y = x / ((norm.detach() if detach_norm else norm) + eps)
    return y.masked_fill(norm == 0, 0)


def pairwise_cosine_reference(
    x: Tensor, *, node_size: int | tuple[int, int] = 1, pool: str = "avg", grid: tuple[int, int] | None = None
) -> Tensor:
    y = unit_vectors(pool_nodes(x, node_size, pool, grid), EPS)
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(y.transpose(1, 2), y).to(x.dtype)


torch.library.define("segfast::pairwise_cosine", "(Tensor x, float eps) -> Tensor")
torch.library.define("segfast::pairwise_cosine_backward", "(Tensor grad, Tensor x, float eps) -> Tensor")
_backend.register("pairwise_cosine", "pairwise_cosine_backward")


@torch.library.register_fake("segfast::pairwise_cosine")
def _(x, eps):
    n, _, m = x.shape
    return x.new_empty((n, m, m))


@torch.library.register_fake("segfast::pairwise_cosine_backward")
def _(grad, x, eps):
    nodes_first = x.transpose(1, 2)
    if not x.is_contiguous() and nodes_first.is_contiguous():
        return torch.empty_like(nodes_first).transpose(1, 2)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.segfast.pairwise_cosine)
def _(x, *args, out_shape=None, **kwargs) -> int:
    n, c, m = x
    return 2 * n * m * m * c


@register_flop_formula(torch.ops.segfast.pairwise_cosine_backward)
def _(grad, x, *args, out_shape=None, **kwargs) -> int:
    n, c, m = x
    return 4 * n * m * m * c


class PairwiseCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps):
        ctx.save_for_backward(x)
        ctx.eps = eps
        return torch.ops.segfast.pairwise_cosine.default(x, eps)

    @staticmethod
    def backward(ctx, grad):
        backward = torch.ops.segfast.pairwise_cosine_backward.default
        return _backend.once("pairwise_cosine", backward, grad, *ctx.saved_tensors, ctx.eps), None


def pairwise_cosine(
    x: Tensor, *, node_size: int | tuple[int, int] = 1, pool: str = "avg", grid: tuple[int, int] | None = None
) -> Tensor:
    """Cosine similarity of every pair of nodes of a feature map: affinities to plot, or to build other losses on.

    a[n, i, j] = f_i . f_j / ((|f_i| + 1e-8) (|f_j| + 1e-8)),   f_i: the nodes of image n, row by row
    (Liu et al., Structured Knowledge Distillation, arXiv:1903.04197, eq. 3)

    Args:
        x: (N, C, H, W), float, any strides.
        node_size: height and width of a node's window, kernel and stride of the pooling; a window that the edge cuts off pools
            what it covers. 1: every position is a node.
        pool: "avg" or "max".
        grid: (rows, columns) of nodes by adaptive pooling instead; `node_size` is then left alone.

    Returns:
        (N, M, M), of x's dtype and symmetric; rows and columns of a zero vector are 0.

    Raises:
        ValueError: wrong rank, an empty map, node_size or grid < 1, an unknown pool.
        TypeError: x is not of a real float dtype.
    """
    check_features("pairwise_cosine", x)
    check_pooling("pairwise_cosine", node_size, pool, grid)
    if not _backend.has_kernel("pairwise_cosine", x):
        return pairwise_cosine_reference(x, node_size=node_size, pool=pool, grid=grid)
    return PairwiseCosine.apply(pool_nodes(x, node_size, pool, grid), EPS)
