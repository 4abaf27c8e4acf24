"""The program ``gradclip``, with the arguments of this process."""

import os
import signal
import sys

from gradclip._gradclip import main as run


def main() -> int:
    """Run the program. Returns its exit code."""
    # Python would wait with an interrupt until the program returns.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "XDG_RUNTIME_DIR" not in os.environ:
        # Mesa's device-select layer prints an error to stderr wherever there is no desktop session.
        os.environ["NODEVICE_SELECT"] = "1"
    return run(["gradclip", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
