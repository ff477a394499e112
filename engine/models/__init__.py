"""Backbones: packed ids in, hidden states out."""
