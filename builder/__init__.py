"""A Dockerfile and a context to an image; its steps run through runner.  Empty as yet."""
