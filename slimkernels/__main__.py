"""``python -m slimkernels`` is the console script ``slimkernels``."""

import sys

from slimkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
