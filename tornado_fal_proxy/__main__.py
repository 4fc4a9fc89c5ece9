"""Run the command ``tornado-fal-proxy`` as ``python -m tornado_fal_proxy``."""

import sys

from tornado_fal_proxy.service import main

if __name__ == "__main__":
    sys.exit(main())
