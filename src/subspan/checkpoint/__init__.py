"""Checkpoints that are whole or not there: checksummed, without pickle, for one process or many."""

from subspan.checkpoint.load import load_checkpoint, read_optimizer
from subspan.checkpoint.manifest import Manifest, Report, verify
from subspan.checkpoint.runs import best, latest, rotate
from subspan.checkpoint.save import save_checkpoint, write_optimizer
from subspan.checkpoint.staging import CheckpointWriteError, staged

__all__ = [
    "CheckpointWriteError",
    "Manifest",
    "Report",
    "best",
    "latest",
    "load_checkpoint",
    "read_optimizer",
    "rotate",
    "save_checkpoint",
    "staged",
    "verify",
    "write_optimizer",
]
