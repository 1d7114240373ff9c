"""Shapes, dtypes, layouts and options that nobody thought of: the error rule on descriptors drawn by hypothesis."""

from __future__ import annotations

import pytest
from conftest import count
from descriptors import BUILD, DESCRIBE, build, draw
from drawing import each_drawn
from harness import OPS, check_rule

from segfast import ops


def test_every_op_has_a_strategy():
    assert set(OPS) <= set(DESCRIBE)
    assert set(DESCRIBE) == set(BUILD)


@pytest.mark.parametrize("op", DESCRIBE)
def test_rule(op):
    if not hasattr(ops, op):
        pytest.skip(f"segfast.ops has no {op}")

    def check(integer, choice):
        check_rule(op, build(op, draw(op, integer, choice)))

    each_drawn(count(50, 300), check)
