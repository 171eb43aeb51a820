"""The storage daemon: an engine that keeps blocks, and the service around it."""
