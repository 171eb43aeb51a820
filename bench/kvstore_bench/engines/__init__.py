"""What does the I/O of a job: one module an engine, chosen by `ioengine`."""
