"""Encoders and rerankers: load published checkpoints, batch the inputs, and run on a device."""
