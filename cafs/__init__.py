"""Content-addressed images: index, objects, store, cache, mounts.  Knows nothing of command lines."""

__version__ = "0.1.0"
