"""What is wrong with a Dockerfile: FILE:LINE:COLUMN: MESSAGE."""

from __future__ import annotations

from cafs.errors import CafsError


class DockerfileError(CafsError):
    """name, line: where.  Exit status 1, as docker build has it."""

    def __init__(self, name: str, line: int, message: str, *, text: str = "", hint: str | None = None) -> None:
        """text: of the line, for the column at which it begins."""
        super().__init__(f"{name}:{line}:{len(text) - len(text.lstrip()) + 1}: {message}", hint=hint)
        self.name = name
        self.line = line
        self.message = message
