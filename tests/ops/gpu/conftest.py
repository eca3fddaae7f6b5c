"""Keep the tests for Triton's interpreter out of a process that has not chosen it."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted.py"]
