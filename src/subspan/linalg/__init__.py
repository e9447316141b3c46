"""Randomised linear algebra: pure functions on tensors, batched over leading dimensions, torch alone.

A is (..., m, n); a basis Q is (..., m, r) with orthonormal columns, float32 (float64 for float64 input); B = QᵀA.
Functions never modify their inputs, take an explicit CPU generator, draw on the CPU, and run without gradients.
"""

from subspan.linalg.adaptive import AdaptiveMethod, adaptive_range_finder
from subspan.linalg.compact_wy import CompactWY
from subspan.linalg.gram_schmidt import blocked_gram_schmidt
from subspan.linalg.operator import DenseOperator, MatrixOperator, as_operator
from subspan.linalg.orthonormal import (
    OrthonormalMethod,
    canonical_signs,
    orthogonality_error,
    orthonormalize,
    random_stiefel,
)
from subspan.linalg.range_finder import RangeFinderResult, SVDResult, exact_basis, randomized_svd, range_finder
from subspan.linalg.sketch import gaussian_sketch, seeded_generator
from subspan.linalg.spectrum import captured_energy, principal_angles, subspace_overlap
from subspan.linalg.tolerance import AdaptiveResult, FixedPrecision
from subspan.linalg.truncated import residual_curve

__all__ = [
    "AdaptiveMethod",
    "AdaptiveResult",
    "CompactWY",
    "DenseOperator",
    "FixedPrecision",
    "MatrixOperator",
    "OrthonormalMethod",
    "RangeFinderResult",
    "SVDResult",
    "adaptive_range_finder",
    "as_operator",
    "blocked_gram_schmidt",
    "canonical_signs",
    "captured_energy",
    "exact_basis",
    "gaussian_sketch",
    "orthogonality_error",
    "orthonormalize",
    "principal_angles",
    "random_stiefel",
    "randomized_svd",
    "range_finder",
    "residual_curve",
    "seeded_generator",
    "subspace_overlap",
]
