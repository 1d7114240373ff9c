"""Hypothesis as the two functions that descriptors.draw takes."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def each_drawn(examples: int, check: Callable) -> None:
    """check(integer, choice) for so many examples, the same ones in every run."""

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        integer = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
        choice = lambda values: data.draw(st.sampled_from(list(values)))  # noqa: E731
        check(integer, choice)

    run()
