"""Declarations of optimizer state, and how it is held."""

from subspan.state.codec import BFloat16, Blockwise, Codec, basis_codec, moment_codec
from subspan.state.double import DoubleBlockwise
from subspan.state.int8_weight import Int8Weight, held
from subspan.state.rounding import random_bits, random_bits_of_runs, round_stochastically
from subspan.state.spec import StateSpec, stored

__all__ = [
    "BFloat16",
    "Blockwise",
    "Codec",
    "DoubleBlockwise",
    "Int8Weight",
    "StateSpec",
    "basis_codec",
    "held",
    "moment_codec",
    "random_bits",
    "random_bits_of_runs",
    "round_stochastically",
    "stored",
]
