"""The agent of a GPU node: a server whose blocks come by two paths."""
