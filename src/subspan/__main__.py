"""``python -m subspan``."""

import sys

from subspan.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
