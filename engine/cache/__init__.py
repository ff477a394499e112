"""The paged cache of keys and values, as a card game: whose blocks are whose, and which can be used again. Pure."""
