"""``python -m tornado_fal_proxy`` is the command ``tornado-fal-proxy``."""

import sys

from tornado_fal_proxy.service import main

if __name__ == "__main__":
    sys.exit(main())
