"""``python -m medshard`` is ``medshard``."""

import sys

from medshard.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
