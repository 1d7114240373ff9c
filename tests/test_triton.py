"""The Triton kernels, without a GPU: interpreted against the references, and compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent


def test_interpreted():
    """tests/interpreted_triton.py, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / "interpreted_triton.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "SEGFAST_BACKEND": "triton"},
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
