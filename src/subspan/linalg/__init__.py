"""Randomised linear algebra: pure functions on tensors, batched over leading dimensions, torch alone.

A is (..., m, n); a basis Q is (..., m, r) with orthonormal columns, float32 (float64 for float64 input); B = QᵀA.
Functions never modify their inputs, take an explicit CPU generator, draw on the CPU, and run without gradients.
"""

from subspan.linalg.operator import DenseOperator, MatrixOperator, as_operator
from subspan.linalg.orthonormal import canonical_signs, orthogonality_error, orthonormalize, random_stiefel
from subspan.linalg.range_finder import RangeFinderResult, SVDResult, exact_basis, randomized_svd, range_finder
from subspan.linalg.sketch import gaussian_sketch, seeded_generator
from subspan.linalg.spectrum import captured_energy, principal_angles, subspace_overlap

__all__ = [
    "DenseOperator",
    "MatrixOperator",
    "RangeFinderResult",
    "SVDResult",
    "as_operator",
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
    "seeded_generator",
    "subspace_overlap",
]
