"""The modules that replace ``nn.Linear`` and transformers' ``Conv1D``."""

from __future__ import annotations

from hwkern.nn.conv1d import Int8Conv1D
from hwkern.nn.linear import Int8Linear

__all__ = ["Int8Conv1D", "Int8Linear"]
