"""Workers, clouds, jobs and functions; runs the other tools as commands."""
