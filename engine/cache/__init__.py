"""The paged cache of keys and values: whose blocks are whose, and which can be used again. A card game, but for
`storage.py`, which has the blocks' memory, and `choice.py`, which asks whether there is to be any.
"""
