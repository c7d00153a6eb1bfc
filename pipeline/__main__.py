import sys

# On a cluster, `python` may be older than its Ray's.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}")

from pipeline.cli.program import main

sys.exit(main())
