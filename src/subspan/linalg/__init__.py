"""Randomised linear algebra: pure functions on tensors, batched over leading dimensions, torch alone.

A is (..., m, n); a basis Q is (..., m, r) with orthonormal columns, float32 (float64 for float64 input); B = QᵀA.
Functions never modify their inputs, take an explicit CPU generator, draw on the CPU, and run without gradients.
"""

from subspan.linalg.adaptive import AdaptiveMethod, adaptive_range_finder
from subspan.linalg.compact_wy import CompactWY
from subspan.linalg.divided import DividedOperator, divided_range_finder
from subspan.linalg.division import Division
from subspan.linalg.exact import exact_basis, gram_basis
from subspan.linalg.gram_schmidt import blocked_gram_schmidt
from subspan.linalg.krylov import krylov_range_finder
from subspan.linalg.operator import DenseOperator, MatrixOperator, as_operator
from subspan.linalg.orthonormal import (
    OrthonormalMethod,
    canonical_signs,
    orthogonality_error,
    orthonormalize,
    random_stiefel,
)
from subspan.linalg.range_finder import (
    RangeFinderResult,
    SVDResult,
    randomized_range_finder,
    randomized_svd,
    range_finder,
)
from subspan.linalg.sharded import RowShardedOperator
from subspan.linalg.sketch import (
    SketchKind,
    gaussian_sketch,
    hadamard_sketch,
    sampling_sketch,
    seeded_generator,
    sparse_sign_sketch,
)
from subspan.linalg.spectrum import (
    captured_energy,
    effective_rank,
    energy_curve,
    nuclear_norm_bound,
    principal_angles,
    rank_for_energy,
    stable_rank,
    subspace_overlap,
)
from subspan.linalg.structured import OuterProductOperator, SumOperator, TransposedOperator
from subspan.linalg.subspace import MethodChoice, SubspaceMethod, choose_method, subspace
from subspan.linalg.summed import SummedOperator
from subspan.linalg.surplus import complete, round_off_floor, within_rank
from subspan.linalg.tensors import TuckerResult, TwoSidedResult, hosvd, st_hosvd, two_sided_range_finder, unfold
from subspan.linalg.tolerance import AdaptiveResult, FixedPrecision
from subspan.linalg.tracking import dct_basis, grassmann_step, largest_rows, oja_step, power_step, svd_update
from subspan.linalg.truncated import residual_curve

__all__ = [
    "AdaptiveMethod",
    "AdaptiveResult",
    "CompactWY",
    "DenseOperator",
    "DividedOperator",
    "Division",
    "FixedPrecision",
    "MatrixOperator",
    "MethodChoice",
    "OrthonormalMethod",
    "OuterProductOperator",
    "RangeFinderResult",
    "RowShardedOperator",
    "SVDResult",
    "SketchKind",
    "SubspaceMethod",
    "SumOperator",
    "SummedOperator",
    "TransposedOperator",
    "TuckerResult",
    "TwoSidedResult",
    "adaptive_range_finder",
    "as_operator",
    "blocked_gram_schmidt",
    "canonical_signs",
    "captured_energy",
    "choose_method",
    "complete",
    "dct_basis",
    "divided_range_finder",
    "effective_rank",
    "energy_curve",
    "exact_basis",
    "gaussian_sketch",
    "gram_basis",
    "grassmann_step",
    "hadamard_sketch",
    "hosvd",
    "krylov_range_finder",
    "largest_rows",
    "nuclear_norm_bound",
    "oja_step",
    "orthogonality_error",
    "orthonormalize",
    "power_step",
    "principal_angles",
    "random_stiefel",
    "randomized_range_finder",
    "randomized_svd",
    "range_finder",
    "rank_for_energy",
    "residual_curve",
    "round_off_floor",
    "sampling_sketch",
    "seeded_generator",
    "sparse_sign_sketch",
    "st_hosvd",
    "stable_rank",
    "subspace",
    "subspace_overlap",
    "svd_update",
    "two_sided_range_finder",
    "unfold",
    "within_rank",
]
