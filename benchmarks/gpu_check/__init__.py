"""The checks of scripts/gpu_check.sh: everything that needs a GPU, for a machine with one GPU, torch and transformers,
offline.

A part is a function that takes a Run. It records figures, and it fails if one of its cases raises an exception.
__main__.py runs the parts.
"""
