"""overhaul_loss: the formula written out, masks, NaN and infinity, tiny gradients in half precision, refusals."""

from __future__ import annotations

import pytest
import torch
from harness import check_rule, reference_only, same_bits

from segfast import _backend, ops, testing

CPU = torch.device("cpu")


def maps(*size, dtype=torch.float64, layout="contiguous"):
    student, teacher = (testing.tensor(*size, dtype=dtype, device=CPU, layout=layout, seed=i) for i in (0, 1))
    return student, teacher, -testing.tensor(size[1], dtype=dtype, device=CPU, seed=2).abs()


def written_out(student, teacher, margin, mask=None):
    """(sum, gradient, elements that count), element by element."""
    total, gradient, counted = 0.0, torch.zeros_like(student), 0
    for n in range(student.shape[0]):
        for c in range(student.shape[1]):
            for y in range(student.shape[2]):
                for x in range(student.shape[3]):
                    if mask is not None and not mask[n, y, x]:
                        continue
                    counted += 1
                    s, t = student[n, c, y, x].item(), max(teacher[n, c, y, x].item(), margin[c].item())
                    if not s <= t <= 0:
                        total += (t - s) ** 2
                        gradient[n, c, y, x] = 2 * (s - t)
    return total, gradient, counted


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_the_formula(layout, kernel_set):
    student, teacher, margin = maps(2, 5, 3, 4, layout=layout)
    for mask in (None, torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.6):
        total, gradient, counted = written_out(student, teacher, margin, mask)
        for reduction, divisor in {"sum": 1, "batchmean": 2, "mean": counted}.items():
            s = student.clone().requires_grad_()
            loss = ops.overhaul_loss(s, teacher, margin, mask=mask, reduction=reduction)
            loss.backward()
            torch.testing.assert_close(loss.item(), total / divisor, rtol=1e-13, atol=0)
            torch.testing.assert_close(s.grad, gradient / divisor, rtol=1e-13, atol=1e-15)


def test_below_the_margin_nothing_is_learned_and_above_it_everything(kernel_set):
    teacher, margin = torch.tensor([-3.0, -0.2, 0.5]).view(1, 1, 1, 3), torch.tensor([-0.7])
    for value, expected in ((-5.0, 0.5 + 5.0), (-0.7, 0.5 + 0.7), (-0.5, None), (1.0, None)):
        s = torch.full((1, 1, 1, 3), value, requires_grad=True)
        ops.overhaul_loss(s, teacher, margin, reduction="sum").backward()
        pulled = s.grad.flatten().tolist()
        if expected is not None:
            assert pulled[:2] == [0, 0]
            assert pulled[2] == pytest.approx(-2 * expected)
        else:
            assert pulled[0] == pytest.approx(2 * (value + 0.7))
            assert (pulled[1] == 0) == (value == -0.5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_nan_and_infinity_go_where_the_references_go(dtype, layout, kernel_set):
    student, teacher, margin = maps(1, 6, 4, 9, dtype=dtype, layout=layout)
    values = (float("nan"), float("inf"), -float("inf"))
    for column, (value, both) in enumerate((v, b) for v in values for b in (False, True)):
        for pick, x in enumerate((student, teacher)):
            if both or pick == column % 2:
                x[0, column % 6, :, column] = value
    for chosen in ("student", "teacher", "margin", None):
        arguments = {"student": student.clone(), "teacher": teacher.clone(), "margin": margin.clone()}
        if chosen:
            arguments[chosen][(0,) * arguments[chosen].dim()] = float("nan")
        for column in range(9):
            piece = {k: v[..., column : column + 1] if v.dim() == 4 else v for k, v in arguments.items()}
            check_rule("overhaul_loss", testing.Sample(f"{chosen} {column}", tuple(piece.values()), {"reduction": "sum"}), [0])


def test_ignored_positions_may_hold_anything(kernel_set):
    student, teacher, margin = maps(2, 3, 4, 5, dtype=torch.float32)
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    results = []
    for rubbish in (0.0, float("nan")):
        s, t = (torch.where(mask.unsqueeze(1), x, rubbish) for x in (student, teacher))
        s.requires_grad_()
        loss = ops.overhaul_loss(s, t, margin, mask=mask)
        loss.backward()
        results.append((loss.detach(), s.grad))
    assert all(same_bits(a, b) for a, b in zip(*results))
    assert results[0][0] > 0


def test_gradients_below_half_precisions_smallest_number(kernel_set):
    """Of a mean over many elements, scaled as mixed precision scales it."""
    student, teacher, margin = maps(1, 64, 64, 64, dtype=torch.float16)
    student = (teacher.float() + 0.01).half().requires_grad_()
    loss = ops.overhaul_loss(student, teacher.abs(), margin)
    (loss * 65536).backward()
    with reference_only():
        exact = student.detach().float().requires_grad_()
        (ops.overhaul_loss(exact, teacher.abs().float(), margin.float()) * 65536).backward()
    torch.testing.assert_close(student.grad.float(), exact.grad, rtol=2e-3, atol=1e-7)


def test_float64_with_another_dtype():
    student, teacher, margin = maps(1, 3, 4, 5)
    for s, t in ((student, teacher.float()), (student.float(), teacher)):
        loss = ops.overhaul_loss(s, t, margin)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, ops.overhaul_loss(s.double(), t.double(), margin), rtol=1e-15, atol=0)


BAD = {
    "rank": (ValueError, lambda s, t, m: (s[0], t[0], m), {}),
    "shapes": (ValueError, lambda s, t, m: (s, t[:, :, :2], m), {}),
    "margin": (ValueError, lambda s, t, m: (s, t, m[:2]), {}),
    "integer": (TypeError, lambda s, t, m: (s.int(), t, m), {}),
    "complex": (TypeError, lambda s, t, m: (s, t.to(torch.complex128), m), {}),
    "integer margin": (TypeError, lambda s, t, m: (s, t, m.int()), {}),
    "device": (ValueError, lambda s, t, m: (s, t.to("meta"), m), {}),
    "mask": (ValueError, lambda s, t, m: (s, t, m), {"mask": torch.ones(1, 3, 3, dtype=torch.bool)}),
    "float mask": (TypeError, lambda s, t, m: (s, t, m), {"mask": torch.ones(1, 4, 5)}),
    "reduction": (ValueError, lambda s, t, m: (s, t, m), {"reduction": "none"}),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    kind, change, options = BAD[name]
    before = _backend._C.kernel_calls() if _backend._C else None
    with pytest.raises(kind, match=r"overhaul_loss: want .*got "):
        ops.overhaul_loss(*change(*maps(1, 3, 4, 5)), **options)
    assert before is None or _backend._C.kernel_calls() == before
