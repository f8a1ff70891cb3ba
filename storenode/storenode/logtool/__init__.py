"""The log as files: copying it out of a node, and checking a copy from the first entry to the last."""
