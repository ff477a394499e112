"""Every case on a device, for compute-sanitizer to watch: python -m emu.sanitized SEEDS"""

from __future__ import annotations

import sys

import torch

from carpool.kernels import launch
from carpool.kernels.launch import CupyBackend
from emu.cases import CASES
from emu.choose import Seeded
from emu.shuttle import Shuttle


def main(seeds: int, shuttle: Shuttle) -> None:
    launch.backend = shuttle
    for case in CASES.values():
        for seed in range(seeds):
            case(Seeded(seed))
    print(f"{len(shuttle.ran)} kernels ran")


if __name__ == "__main__":
    main(int(sys.argv[1]), Shuttle(torch.device("cuda", 0), CupyBackend()))
