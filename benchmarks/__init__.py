"""Speed and memory of the losses.  Nothing outside this folder knows about timing."""

import os

# Before torch is imported: or some builds write two lines to standard error for every profile that memory.py takes.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
