"""``python -m storenode`` is ``storenode``."""

import sys

from storenode.cli import main

if __name__ == "__main__":
    sys.exit(main())
