"""`python -m carpool`: the command, for an environment whose scripts are not on PATH."""

from __future__ import annotations

from carpool.server.cli import main

if __name__ == "__main__":
    main()
