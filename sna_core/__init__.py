"""Separable networks: functions of many inputs built from small learnable functions of one input.

Imports torch alone, and Triton for its kernels where there is one.
"""

from sna_core.axis import Axis
from sna_core.bspline import UniformBSpline
from sna_core.cross import separate
from sna_core.digit_head import DigitHead
from sna_core.embedding import CodebookEmbedding, LowRankEmbedding, SeparableEmbedding
from sna_core.graded import graded_breakpoints
from sna_core.network import CPNetwork
from sna_core.operators import Problem, Product, Term, derivative, multiply

__all__ = [
    "Axis",
    "CPNetwork",
    "CodebookEmbedding",
    "DigitHead",
    "LowRankEmbedding",
    "Problem",
    "Product",
    "SeparableEmbedding",
    "Term",
    "UniformBSpline",
    "derivative",
    "graded_breakpoints",
    "multiply",
    "separate",
]
