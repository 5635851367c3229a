"""Turn an image and a command line into a running container, by way of runc."""
