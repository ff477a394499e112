"""Classes for what neither transformers has nor a translation reaches, registered with its Auto classes."""
