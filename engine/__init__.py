"""The room where text goes in and arrays come out. It knows nothing of HTTP."""
