"""The storage engine: synchronous, single owner, no I/O of its own on the loop's thread."""
