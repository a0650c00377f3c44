"""`python -m fastmon`: the same as the command `fastmon`."""

import sys

from fastmon.cli import main

sys.exit(main())
