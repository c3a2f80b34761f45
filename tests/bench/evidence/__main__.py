"""See study.py."""

import os
import sys
from pathlib import Path

os.environ.setdefault(
    "RAY_AUTH_MODE", "token"
)  # before Ray is imported, which reads it then (2.60)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[0] = str(
    Path(__file__).parents[2]
)  # so that no file here hides another module of its name

from bench.evidence.study import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
