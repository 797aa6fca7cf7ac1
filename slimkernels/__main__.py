"""``python -m slimkernels`` runs the same program as the console script ``slimkernels``."""

import sys

from slimkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
