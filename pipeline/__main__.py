import os
import signal
import sys
from io import TextIOWrapper

# On a cluster, `python` may be older than its Ray's.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}")
for number in (signal.SIGINT, signal.SIGTERM):  # while the next line imports
    signal.signal(number, lambda *_: os._exit(130))

from pipeline.compute.interrupt import exit_at_once, set_handlers  # noqa: E402


def main() -> int:
    """Run the program; a signal ends it at any time without a traceback, also during its imports and at its end."""
    set_handlers(exit_at_once)
    from pipeline.cli.program import main as run

    sys.path.append(os.getcwd())  # a custom network may be there

    if isinstance(sys.stdout, TextIOWrapper):  # it is None if it was closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of few characters lacks a ± or ≤
    set_handlers(signal.default_int_handler)
    try:
        return run()
    except KeyboardInterrupt:  # while the command line was read
        exit_at_once()
    finally:
        set_handlers(exit_at_once)
        # Python would end by SIGINT if the last text that it executed, a dataclass's, was interrupted.
        exec("")


if __name__ == "__main__":
    sys.exit(main())
