"""``python -m torchmgmt.http``: the server program."""

import sys

from torchmgmt.http.program import main

if __name__ == "__main__":
    sys.exit(main())
