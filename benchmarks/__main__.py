"""The command ``python -m benchmarks``, run in the root of the checkout."""

import sys

from benchmarks.run import main

if __name__ == "__main__":
    sys.exit(main())
