"""`python -m longctx` is the `longctx` command."""

import sys

from .cli import main

sys.exit(main())
