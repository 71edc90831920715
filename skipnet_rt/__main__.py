"""``python -m skipnet_rt``: the same as ``skipnet-rt``."""

import sys

from skipnet_rt.cli.app import main

if __name__ == "__main__":
    sys.argv[0] = "skipnet-rt"
    main()
