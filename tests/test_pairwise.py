import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from segfast import _backend, distill, ops, testing
from segfast.ops.pairwise_cosine import pairwise_cosine_reference
from segfast.ops.pairwise_loss import gram_pays, pairwise_loss_reference

compiled = pytest.mark.skipif("cpu" not in _backend.table["pairwise_loss"], reason="no compiled kernels")
SETS = _backend._C.cpu_features()["kernel_sets"] if _backend._C else []


@pytest.fixture(params=SETS)
def each_set(request):
    _backend._C.set_kernel_set(request.param)
    yield request.param
    _backend._C.set_kernel_set("auto")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def randn(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def written_out(student, teacher):
    """Equation 2 over the cosine similarities of equation 3, node by node."""
    total = 0
    for s, t in zip(student, teacher):
        s, t = s.flatten(1), t.flatten(1)
        for i in range(s.shape[1]):
            for j in range(s.shape[1]):
                a_s = F.cosine_similarity(s[:, i], s[:, j], dim=0, eps=0)
                a_t = F.cosine_similarity(t[:, i], t[:, j], dim=0, eps=0)
                total += (a_s - a_t) ** 2
    return total / student.shape[0] / s.shape[1] ** 2


def official(student, teacher, scale=0.5):
    """The released CriterionPairWise: max-pooled patches, norms out of the graph, sum of squares over M^2 and N."""
    patch = tuple(int(size * scale) for size in teacher.shape[2:])
    pooled = [F.max_pool2d(x, patch, patch, 0, ceil_mode=True) for x in (student, teacher)]
    matrices = []
    for x in pooled:
        norm = x.square().sum(1).sqrt().unsqueeze(1) + 1e-8
        x = (x / norm.detach()).flatten(2)
        matrices.append(torch.einsum("icm,icn->imn", x, x))
    nodes = pooled[1].shape[2] * pooled[1].shape[3]
    return ((matrices[1] - matrices[0]) ** 2 / nodes**2 / student.shape[0]).sum()


def value_and_gradients(f, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = f(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs)


def close(a, b, tolerance=1e-11):
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * y.abs().max().item() if y.numel() else 0)


@pytest.mark.parametrize("channels", [(3, 5), (40, 17)], ids=["gram", "direct"])
def test_the_formula_of_the_paper(channels):
    student, teacher = randn(2, channels[0], 4, 5), randn(2, channels[1], 4, 5, seed=1)
    got = value_and_gradients(partial(ops.pairwise_loss, node_size=1), student, teacher)
    close(got, value_and_gradients(written_out, student, teacher), 1e-7)  # eps


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (5, 2)])
def test_the_released_formula(size):
    student, teacher = randn(2, 6, *size), randn(2, 11, *size, seed=1)
    got = value_and_gradients(distill.PairWiseLoss(preset="official"), student, teacher)
    close(got, value_and_gradients(official, student, teacher))


def test_detach_norm_is_the_released_gradient_and_not_the_true_one():
    student, teacher = randn(2, 6, 9, 8), randn(2, 6, 9, 8, seed=1)
    loss = partial(ops.pairwise_loss, node_size=(4, 4), pool="max")
    true, detached = (value_and_gradients(partial(loss, detach_norm=d), student, teacher) for d in (False, True))
    close(detached, value_and_gradients(official, student, teacher))
    assert true[0] == detached[0]
    assert (true[1] - detached[1]).abs().max() > 1e-3 * true[1].abs().max()


def test_edge_windows_average_what_they_cover():
    x = randn(1, 3, 5, 4)
    rows = [x[:, :, i : i + 2, j : j + 3].mean((2, 3)) for i in (0, 2, 4) for j in (0, 3)]
    nodes = torch.stack(rows, 2).unsqueeze(3)
    close([ops.pairwise_cosine(x, node_size=(2, 3))], [ops.pairwise_cosine(nodes)])


def test_grid_takes_any_sizes_and_leaves_node_size_alone():
    student, teacher = randn(2, 6, 7, 9), randn(2, 10, 14, 5, seed=1)
    got = value_and_gradients(partial(ops.pairwise_loss, grid=(3, 4), node_size=0), student, teacher)

    def pooled(s, t):
        return ops.pairwise_loss(F.adaptive_avg_pool2d(s, (3, 4)), F.adaptive_avg_pool2d(t, (3, 4)), node_size=1)

    close(got, value_and_gradients(pooled, student, teacher))


def test_cosine_is_the_matrix_of_cosines():
    x = randn(2, 5, 3, 4)
    nodes = x.flatten(2)
    wanted = F.cosine_similarity(nodes.unsqueeze(2), nodes.unsqueeze(3), dim=1)
    got = ops.pairwise_cosine(x)
    close([got], [wanted], 1e-7)
    assert torch.equal(got, got.transpose(1, 2))


@compiled
@pytest.mark.parametrize(
    "nodes, channels", [((3, 3), (1, 1)), ((8, 8), (8, 8)), ((9, 7), (25, 30)), ((5, 5), (30, 24)), ((17, 19), (9, 70))]
)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_both_forms_on_every_kernel_set(each_set, nodes, channels, layout):
    s, t = (
        testing.tensor(2, c, *nodes, dtype=torch.float64, device="cpu", layout=layout, seed=i) for i, c in enumerate(channels)
    )
    s, t = s.flatten(2), t.flatten(2)
    wanted = value_and_gradients(lambda s, t: pairwise_loss_reference(s.unsqueeze(3), t.unsqueeze(3), node_size=1), s, t)
    for gram in (False, True):
        loss, saved = torch.ops.segfast.pairwise_loss(s, t, 1e-8, gram)
        grad = torch.tensor(1.0)
        backward = torch.ops.segfast.pairwise_loss_backward
        got = loss, backward(grad, s, t, saved, 1e-8, gram, False), backward(grad, t, s, None, 1e-8, gram, False)
        if channels == (1, 1):  # all cosines are +-1: the gradient is about eps
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-14)
        else:
            close(got, wanted)


@compiled
@pytest.mark.parametrize("dtype", _backend.DTYPES)
def test_cosine_on_every_kernel_set(each_set, dtype):
    x = randn(2, 21, 9, 7, dtype=dtype)
    weight = randn(2, 63, 63, seed=1, dtype=dtype)
    got = value_and_gradients(lambda x: (ops.pairwise_cosine(x) * weight).double().sum(), x)
    exact = value_and_gradients(lambda x: (pairwise_cosine_reference(x) * weight.double()).sum(), x.double())
    assert (got[1].double() - exact[1]).abs().max() <= 4 * torch.finfo(dtype).eps * exact[1].abs().max()


def near(teacher, kind, noise, channels):
    """A student whose matrices are close to the teacher's: its features need not be."""
    generator = torch.Generator().manual_seed(7)
    teacher = teacher.double()
    student = teacher + noise * torch.randn(teacher.shape, generator=generator, dtype=torch.float64)
    if channels != teacher.shape[1]:  # an isometry into another number of channels
        wide = torch.linalg.qr(torch.randn(channels, teacher.shape[1], generator=generator, dtype=torch.float64))[0]
        return torch.einsum("dc,nchw->ndhw", wide, student)
    if kind == "rotated":
        rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))[0]
        return torch.einsum("dc,nchw->ndhw", rotation, student)
    if kind == "permuted":
        return student[:, torch.randperm(channels, generator=generator)]
    return student


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("nodes", [6, 20, 48])
@pytest.mark.parametrize("kind, channels", [("aligned", 32), ("rotated", 32), ("permuted", 32), ("isometry", 70)])
def test_accurate_near_the_teacher(kind, channels, nodes):
    """Relative error at most 1e-5 down to loss / ||G||^2 = 1e-9."""
    teacher = randn(2, 32, nodes, nodes, dtype=torch.float32)
    reached = []
    for noise in (1e-1, 1e-2, 1e-3, 1e-4, 3e-5):
        student = near(teacher, kind, noise, channels).float()
        exact = value_and_gradients(lambda s: pairwise_loss_reference(s, teacher.double(), node_size=1), student.double())
        got = value_and_gradients(lambda s: ops.pairwise_loss(s, teacher, node_size=1), student)
        scale = ops.pairwise_cosine(teacher.double()).square().mean()
        reached.append((exact[0] / scale).item())
        if kind == "aligned" or "cpu" in _backend.table["pairwise_loss"]:
            assert abs(got[0].double() - exact[0]) <= 1e-5 * exact[0], f"at {reached[-1]:.1e}"
            assert (got[1].double() - exact[1]).abs().max() <= 1e-5 * exact[1].abs().max(), f"at {reached[-1]:.1e}"
    assert min(reached) < 2e-9


@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("size", [(3, 3), (9, 9)])
@pytest.mark.parametrize("dtype", _backend.DTYPES)
def test_zero_vectors(dtype, size, detach_norm):
    student, teacher = randn(2, 12, *size, dtype=dtype), randn(2, 10, *size, seed=1, dtype=dtype)
    student[0, :, 1, 2] = 0
    teacher[0, :, 0, 0] = 0
    teacher[1] = 0
    loss = partial(ops.pairwise_loss, node_size=1, detach_norm=detach_norm)
    got = value_and_gradients(loss, student, teacher)
    assert all(x.isfinite().all() for x in got)
    assert not got[1][0, :, 1, 2].any()
    assert not got[2][1].any()
    reference = partial(pairwise_loss_reference, node_size=1, detach_norm=detach_norm)
    exact = value_and_gradients(reference, student.double(), teacher.double())
    for x, y in zip(got, exact):
        assert (x.double() - y).abs().max() <= max(1e-14, 4 * torch.finfo(x.dtype).eps) * y.abs().max()
    x = student.requires_grad_()
    matrix = ops.pairwise_cosine(x)
    assert not matrix[0, size[1] + 2].any()
    assert torch.autograd.grad(matrix.sum(), x)[0].isfinite().all()


def test_nan_and_infinity_propagate():
    for bad in (float("nan"), float("inf"), -float("inf")):
        for size in (3, 9):
            student, teacher = randn(2, 5, size, size), randn(2, 5, size, size, seed=1)
            student[1, 2, 0, 1] = bad
            got = value_and_gradients(partial(ops.pairwise_loss, node_size=1), student, teacher)
            reference = value_and_gradients(partial(pairwise_loss_reference, node_size=1), student, teacher)
            for x, y in zip(got, reference):
                torch.testing.assert_close(x, y, equal_nan=True)


def test_extremes_of_size():
    empty = torch.zeros(0, 4, 6, 6, requires_grad=True)
    loss = ops.pairwise_loss(empty, empty.detach())
    assert loss.isnan()
    assert torch.autograd.grad(loss, empty)[0].shape == empty.shape
    one = value_and_gradients(ops.pairwise_loss, randn(2, 3, 1, 1), randn(2, 2, 1, 1, seed=1))
    assert all(x.abs().max() < 1e-12 for x in one)  # one node is like itself
    assert ops.pairwise_loss(randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1), node_size=9) < 1e-12
    same = randn(1, 20, 9, 9)
    assert 0 <= ops.pairwise_loss(same, same.clone(), node_size=1) < 1e-16


def test_dtypes_mix_and_autocast_changes_nothing():
    student, teacher = randn(1, 4, 6, 6, dtype=torch.float32), randn(1, 4, 6, 6, seed=1, dtype=torch.bfloat16)
    loss = ops.pairwise_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert ops.pairwise_loss(teacher, teacher).dtype == torch.float32
    assert ops.pairwise_loss(student.double(), teacher).dtype == torch.float64
    for f in (ops.pairwise_loss, pairwise_loss_reference):
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(f(student, teacher), loss)


@compiled
@pytest.mark.parametrize("node_size", [1, 2])
@pytest.mark.parametrize("op", ["pairwise_loss", "pairwise_cosine"])
def test_the_second_derivative_is_refused(op, node_size):
    student = randn(1, 4, 6, 6).requires_grad_()
    inputs = (student, randn(1, 4, 6, 6, seed=1)) if op == "pairwise_loss" else (student,)
    value = getattr(ops, op)(*inputs, node_size=node_size).sum()
    (grad,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: cannot be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("form", ["gram", "direct"])
def test_bitwise_equal_over_threads_and_runs(form, threads):
    size = (2, 24, 40, 33) if form == "gram" else (2, 200, 12, 11)
    student, teacher = randn(*size, dtype=torch.float32), randn(size[0], 70, *size[2:], seed=1, dtype=torch.float32)
    assert gram_pays(size[2] * size[3], size[1], 70) == (form == "gram")

    def all_of_it():
        loss = value_and_gradients(partial(ops.pairwise_loss, node_size=1), student, teacher)
        return *loss, *value_and_gradients(lambda x: ops.pairwise_cosine(x).square().sum(), student[:, :, :9])

    if "cpu" not in _backend.table["pairwise_loss"]:
        pytest.skip("no compiled kernels")
    threads(1)
    first = [x.view(torch.int32) for x in all_of_it()]
    for run in range(50):
        threads(1 + run % 2)
        assert all(torch.equal(a.view(torch.int32), b) for a, b in zip(all_of_it(), first)), f"run {run}"


MEMORY = """
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
import torch
alone = peak()
from segfast import ops
torch.set_num_threads(2)
ops.pairwise_loss(torch.randn(1, 8, 32, 32, requires_grad=True), torch.randn(1, 8, 32, 32), node_size=1).backward()
student, teacher = torch.randn(1, 128, 256, 256, requires_grad=True), torch.randn(1, 128, 256, 256)
ops.pairwise_loss(student, teacher, node_size=1).backward()
assert student.grad.isfinite().all()
print(alone, peak())
"""


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_65536_nodes_within_600_MB():
    """The whole process: PyTorch itself, both feature maps and the gradient (96 MB) included.

    PyTorch's build for CUDA fills 520 MB by its import alone (its build for the CPU 220): there what comes on top counts.
    Read from /proc: ru_maxrss of a new process starts at the peak of the one that started it, here pytest's.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(ops.__file__)))
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(root) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    result = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    alone, peak = map(int, result.stdout.split())
    assert peak - alone < 250
    assert peak < 600 or torch.version.cuda


BAD = {
    "three dimensions": (((2, 3, 4), (2, 3, 4)), {}),
    "no channels": (((2, 0, 4, 4), (2, 3, 4, 4)), {}),
    "an empty map": (((2, 3, 0, 4), (2, 3, 0, 4)), {}),
    "unequal batches": (((2, 3, 4, 4), (1, 3, 4, 4)), {}),
    "unequal sizes": (((2, 3, 4, 4), (2, 3, 5, 4)), {}),
    "unequal batches on a grid": (((2, 3, 4, 4), (1, 3, 5, 4)), {"grid": (2, 2)}),
    "node_size 0": (((2, 3, 4, 4), (2, 3, 4, 4)), {"node_size": 0}),
    "node_size (2, -1)": (((2, 3, 4, 4), (2, 3, 4, 4)), {"node_size": (2, -1)}),
    "node_size 1.5": (((2, 3, 4, 4), (2, 3, 4, 4)), {"node_size": 1.5}),
    "node_size of three": (((2, 3, 4, 4), (2, 3, 4, 4)), {"node_size": (1, 2, 3)}),
    "pool": (((2, 3, 4, 4), (2, 3, 4, 4)), {"pool": "mean"}),
    "grid 0": (((2, 3, 4, 4), (2, 3, 4, 4)), {"grid": (0, 2)}),
    "grid of one": (((2, 3, 4, 4), (2, 3, 4, 4)), {"grid": 3}),
    "eps 0": (((2, 3, 4, 4), (2, 3, 4, 4)), {"eps": 0.0}),
    "eps nan": (((2, 3, 4, 4), (2, 3, 4, 4)), {"eps": float("nan")}),
    "eps inf": (((2, 3, 4, 4), (2, 3, 4, 4)), {"eps": float("inf")}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    sizes, options = BAD[case]
    with pytest.raises(ValueError, match=r"^pairwise_loss: want .*, got "):
        ops.pairwise_loss(*(torch.zeros(size) for size in sizes), **options)
    if not case.startswith(("unequal", "eps")):
        with pytest.raises(ValueError, match=r"^pairwise_cosine: want .*, got "):
            ops.pairwise_cosine(torch.zeros(sizes[0]), **options)


def test_bad_dtypes_devices_and_module_options():
    x = torch.zeros(1, 2, 4, 4)
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match=r"pairwise_loss: want float32.*got"):
            ops.pairwise_loss(x, x.to(dtype))
        with pytest.raises(TypeError, match=r"pairwise_cosine: want float32.*got"):
            ops.pairwise_cosine(x.to(dtype))
    with pytest.raises(ValueError, match=r"pairwise_loss: want student and teacher on one device"):
        ops.pairwise_loss(x, x.to("meta"))
    for options in ({"preset": "mine"}, {"preset": "official", "node_size": 3}, {"preset": "official", "scale": 0}):
        with pytest.raises(ValueError, match=r"PairWiseLoss: want .*, got "):
            distill.PairWiseLoss(**options)
    assert "official" in repr(distill.PairWiseLoss(preset="official"))


def test_the_module_passes_every_option_on():
    student, teacher = randn(1, 4, 9, 8), randn(1, 4, 9, 8, seed=1)
    options = {"node_size": (2, 3), "pool": "max", "detach_norm": True, "eps": 1e-3}
    assert distill.PairWiseLoss(**options)(student, teacher) == ops.pairwise_loss(student, teacher, **options)
    assert distill.PairWiseLoss(grid=(2, 2))(student, teacher) == ops.pairwise_loss(student, teacher, grid=(2, 2))
