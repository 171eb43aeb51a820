"""Measures other stores beside ours: a harness that is run from a checkout and never installed."""
