"""What scripts/gpu_check.sh runs: every check that needs a GPU, on a machine with one GPU, torch and transformers, without network.

A part is a function of a Run. It notes figures, and it fails when one of its cases raises. __main__.py runs the parts.
"""
