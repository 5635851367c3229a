"""Open the backend that a path or a URL names.  Each kind is imported when it is used: boto3 and urllib3 are slow to load."""

from __future__ import annotations

from cafs.errors import UsageError, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cafs.backend import Backend


def open_backend(url: str) -> Backend:
    """The place that a path or URL means.  Raises UsageError."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        from cafs.directory import DirectoryBackend

        return DirectoryBackend(url)
    if scheme in ("http", "https", "http+unix"):
        from cafs.web import WebBackend

        return WebBackend(url)
    if scheme == "s3":
        from cafs.s3 import S3Backend

        return S3Backend(url)
    raise UsageError(
        f"cannot open store {quote(url)}: unknown scheme {quote(scheme)}", hint="a path, s3://, http:// or https://"
    )
