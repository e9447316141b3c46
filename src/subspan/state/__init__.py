"""Declarations of optimizer state, and how it is held."""

from subspan.state.codec import BFloat16, Blockwise, Codec, basis_codec, moment_codec
from subspan.state.rounding import round_stochastically
from subspan.state.spec import StateSpec, stored

__all__ = [
    "BFloat16",
    "Blockwise",
    "Codec",
    "StateSpec",
    "basis_codec",
    "moment_codec",
    "round_stochastically",
    "stored",
]
