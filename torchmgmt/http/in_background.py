"""``python -m torchmgmt.http.in_background DESCRIPTOR [ARGUMENT...]``: the server process behind ``--start``.

It says on the descriptor, the end of a pipe, what its starter shall say; closing it means that the start is over.
"""

from __future__ import annotations

import os
import sys

from torchmgmt.http.command_line import parse_command_line
from torchmgmt.http.console import Console
from torchmgmt.http.program import serve_here


def main() -> int:
    """Serve until SIGTERM; return the exit code."""
    descriptor, *arguments = sys.argv[1:]
    os.set_inheritable(int(descriptor), False)  # the workers have nothing to say to the starter
    starter = open(int(descriptor), "w", encoding="utf-8", errors="surrogateescape")  # noqa: PTH123, SIM115 - a descriptor, closed by the console
    return serve_here(parse_command_line(arguments), Console(starter))


if __name__ == "__main__":
    sys.exit(main())
