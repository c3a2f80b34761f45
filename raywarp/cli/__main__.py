"""`python -m raywarp.cli`, which is the same as `raywarp`."""

import sys

from raywarp.cli import main

sys.exit(main())
