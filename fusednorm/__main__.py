"""`python -m fusednorm`; what it can do is in `fusednorm/cli/`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
