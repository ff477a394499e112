"""CUDA C run on a CPU: a shim for g++, a runtime of fibers, a checker of memory and barriers, a reader of PTX."""
