"""Speed and memory of the losses against the eager reference.  Nothing outside this folder knows about timing."""
