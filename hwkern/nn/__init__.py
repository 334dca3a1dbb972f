"""The modules that replace ``nn.Linear``, transformers' ``Conv1D`` and ``nn.Embedding``."""

from __future__ import annotations

from hwkern.nn.calibrated import CalibratedInt8Conv1D, CalibratedInt8Linear, Calibration
from hwkern.nn.conv1d import Int8Conv1D
from hwkern.nn.embedding import Int8Embedding
from hwkern.nn.linear import Int8Linear
from hwkern.nn.weight_only import WeightOnlyInt8Conv1D, WeightOnlyInt8Linear

__all__ = [
    "CalibratedInt8Conv1D",
    "CalibratedInt8Linear",
    "Calibration",
    "Int8Conv1D",
    "Int8Embedding",
    "Int8Linear",
    "WeightOnlyInt8Conv1D",
    "WeightOnlyInt8Linear",
]
