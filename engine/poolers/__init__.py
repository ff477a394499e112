"""Poolers: hidden states in, results out; a pooler is a method and the heads behind it."""
