"""Layers whose gradients, weights or activations are of low rank, or held in fewer bits."""

from subspan.nn.cross_entropy import linear_cross_entropy
from subspan.nn.projected import ProjectedConv1D, ProjectedLinear, project_gradients
from subspan.nn.quantised import quantize_weights

__all__ = ["ProjectedConv1D", "ProjectedLinear", "linear_cross_entropy", "project_gradients", "quantize_weights"]
