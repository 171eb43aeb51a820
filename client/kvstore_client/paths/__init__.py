"""The ways bytes travel."""
