"""`python -m raywarp.cli`: the same as `raywarp`."""

import sys

from raywarp.cli import main

sys.exit(main())
