"""See study.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])  # so that no file here hides another module of its name

from bench.evidence.study import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
