"""What is wrong with a Dockerfile: FILE:LINE: MESSAGE."""

from __future__ import annotations

from cafs.errors import CafsError


class DockerfileError(CafsError):
    """name, line: where.  Exit status 1, as docker build has it."""

    def __init__(self, name: str, line: int, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"{name}:{line}: {message}", hint=hint)
        self.name = name
        self.line = line
        self.message = message
