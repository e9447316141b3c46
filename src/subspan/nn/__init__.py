"""Layers whose gradients, weights or activations are of low rank."""

from subspan.nn.cross_entropy import linear_cross_entropy
from subspan.nn.projected import ProjectedConv1D, ProjectedLinear, project_gradients

__all__ = ["ProjectedConv1D", "ProjectedLinear", "linear_cross_entropy", "project_gradients"]
