"""Pretraining on the Hugging Face Trainer: presets, data and the run itself (extra ``subspan[train]``)."""
