"""`python -m fedtune`, and the command `fedtune`: Ctrl-C ends it with a line from its first moment on."""

from __future__ import annotations

import os
import signal
from types import FrameType


def _stopped(number: int, frame: FrameType | None) -> None:
    """End at once: nothing has begun, and an error raised in the middle of an import would be a traceback."""
    os.write(2, b"cancelled by Ctrl-C\n")
    os._exit(128 + number)


def main() -> None:
    """Run the command line."""
    before = signal.signal(signal.SIGINT, _stopped)
    from fedtune.cli import main as run

    try:
        signal.signal(signal.SIGINT, before)
        run()
    except KeyboardInterrupt:
        _stopped(signal.SIGINT, None)


if __name__ == "__main__":
    main()
