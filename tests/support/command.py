"""The command line as a script with a path, which Lightning needs to start further processes of a run."""

import sys

from lightspine_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
