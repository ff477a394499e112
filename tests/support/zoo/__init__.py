"""The zoo: one small checkpoint of every family, in the file layout of the published one, and what it must answer.

A member writes its folder (config keys, weight names, side files and remote-code markers as on the hub; random
weights, inflated so that every mistake shows) and returns a reference that knows nothing of carpool: stock
transformers or a few lines of torch, one prompt at a time, float32. `./dev bench parity` makes the table of
docs/models.md of them, and tests/engine/models/test_zoo.py fails on any drift.
"""

from zoo import (
    adapters,
    classifiers,
    decoders_translated,
    encoders,
    heads,
    llm_embedders,
    native,
    patched,
    rerankers,
    stock,
    towers,
    translated,
)
from zoo.member import Member, Reference

__all__ = ["MEMBERS", "Member", "Reference"]

MEMBERS: tuple[Member, ...] = (
    *stock.MEMBERS,
    *translated.MEMBERS,
    *decoders_translated.MEMBERS,
    *native.MEMBERS,
    *patched.MEMBERS,
    *towers.MEMBERS,
    *encoders.MEMBERS,
    *llm_embedders.MEMBERS,
    *rerankers.MEMBERS,
    *classifiers.MEMBERS,
    *heads.MEMBERS,
    *adapters.MEMBERS,
)
