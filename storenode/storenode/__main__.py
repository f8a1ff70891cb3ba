"""``python -m storenode`` is ``storenode``."""

from storenode.cli import main

if __name__ == "__main__":
    main()
