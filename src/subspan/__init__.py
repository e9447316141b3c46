"""subspan: train large networks inside small subspaces."""

__version__ = "0.1.0"
