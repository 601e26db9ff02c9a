"""Separable networks: functions of many inputs built from small learnable functions of one input.

Imports torch alone, and Triton for its kernels where there is one.
"""

from sna_core.bspline import UniformBSpline
from sna_core.digit_head import DigitHead
from sna_core.embedding import CodebookEmbedding, LowRankEmbedding, SeparableEmbedding
from sna_core.network import CPNetwork

__all__ = [
    "CPNetwork",
    "CodebookEmbedding",
    "DigitHead",
    "LowRankEmbedding",
    "SeparableEmbedding",
    "UniformBSpline",
]
