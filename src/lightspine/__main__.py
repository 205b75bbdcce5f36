"""`python -m lightspine` is the command line."""

import sys

from lightspine_cli.main import main

sys.exit(main())
