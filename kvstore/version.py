"""The version of the distribution, in one place so that every command prints the same."""

VERSION = "0.1.0"
