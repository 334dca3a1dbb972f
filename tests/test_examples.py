"""The examples run as a user would run them, and what they print holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_mlp_is_patched_and_close_to_float32():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "mlp.py"), "--batch", "16"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = dict(re.findall(r"^(float32|hwkern|torch static INT8) +([\d.]+)%", done.stdout, re.MULTILINE))
    assert float(errors["float32"]) == 0
    # Two layers, each about 1.2 % from rounding both operands to 8 bits (docs/numerics.md), the first halved by ReLU.
    assert 0.3 < float(errors["hwkern"]) < 2.5
