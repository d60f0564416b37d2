"""`python -m longctx` is the `longctx` command."""

import sys

from .cli.main import main

sys.exit(main())
