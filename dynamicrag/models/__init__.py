"""Encoders and rerankers: checkpoints as their authors ship them, in batches, on a device."""
