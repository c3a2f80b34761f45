"""See study.py."""

import os
import sys
from pathlib import Path

# before Ray is imported, which reads it then (2.60)
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# so that no file here hides another module of its name
sys.path[0] = str(Path(__file__).parents[2])

from bench.evidence.study import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
