"""Shapes, dtypes, layouts and options that nobody thought of: the error rule on descriptors drawn by hypothesis."""

from __future__ import annotations

import pytest
from conftest import count
from descriptors import BUILD, DESCRIBE, build, draw
from harness import OPS, check_rule
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segfast import ops


def test_every_op_has_a_strategy():
    assert set(OPS) <= set(DESCRIBE)
    assert set(DESCRIBE) == set(BUILD)


@pytest.mark.parametrize("op", DESCRIBE)
def test_rule(op):
    if not hasattr(ops, op):
        pytest.skip(f"segfast.ops has no {op}")

    @settings(
        max_examples=count(50, 300),
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
        choice = lambda values: data.draw(st.sampled_from(list(values)))  # noqa: E731
        check_rule(op, build(op, draw(op, integer, choice)))

    check()
