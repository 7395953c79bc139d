"""Speed and memory of the losses.  Nothing outside this folder knows about timing, but for the search for block sizes."""

import os

# Set before torch is imported: some builds print two lines for every memory profile that timing.py takes.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
