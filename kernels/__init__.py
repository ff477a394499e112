"""The room where tensors go in and tensors come out. It knows nothing of sequences, requests or models.

This file imports nothing, on purpose: transformers probes for an optional package named `kernels` and imports
whatever it finds under that name, and with the repository's root on `sys.path` that is this folder.
"""
