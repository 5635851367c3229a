"""What machines cost at their cloud, and pool.toml with that filled in: nothing else in it is changed."""

from __future__ import annotations

import json
import os
import re

from cafs import atomic
from cafs.errors import CafsError, UnsupportedError, os_error, quote
from pool import settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pool.settings import Settings


def ask(found: Settings) -> dict[str, float]:
    """By the names of [[machines]], an hour.  Raises CafsError, UnsupportedError."""
    if found.cloud.get("provider") != "ec2":
        what = "GCE's prices need an account for billing" if found.cloud else "pool.toml names no cloud"
        raise UnsupportedError(what, hint="write price = ... into pool.toml")
    from pool.ec2 import EC2

    there = EC2(found.cloud, "prices")
    prices = {}
    for table in found.machines:
        kind = str(table.get("type", table["name"]))
        price = there.spot_price(kind) if table.get("spot") else there.price(kind)
        if price is None:
            raise CafsError(f"EC2 has no price for {quote(kind)} in {found.cloud['region']}")
        prices[table["name"]] = price
    return prices


def fill(path: str, prices: dict[str, float]) -> None:
    """Write them into pool.toml.  Raises CafsError, FormatError."""
    try:
        text = atomic.read_file(path, 1 << 20).decode()
    except OSError as error:
        raise os_error(f"cannot read {quote(path)}", error) from error
    new = filled(text, prices)
    draft = path + ".new"
    try:
        atomic.replace_file(draft, new.encode(), 0o600)
        known = {table["name"]: table.get("price") for table in settings.read_file(draft).machines}
        if known != {**known, **prices}:
            raise CafsError(f"cannot find the machines in {quote(path)}", hint="a [[machines]] line each, name below it")
        os.rename(draft, path)
    finally:
        atomic.unlink_quietly(draft)


def filled(text: str, prices: dict[str, float]) -> str:
    """The text of pool.toml with them: a line that is there is changed, else one is added below the name."""
    parts = re.split(r"(?m)^(?=[ \t]*\[)", text)
    return "".join(_with_price(part, prices) for part in parts)


def _with_price(part: str, prices: dict[str, float]) -> str:
    name = re.search(r'(?m)^[ \t]*name[ \t]*=[ \t]*("(?:[^"\\]|\\.)*").*$', part)
    if not re.match(r"[ \t]*\[\[[ \t]*machines[ \t]*\]\]", part) or not name:
        return part
    price = prices.get(_text(name[1]))
    if price is None:
        return part
    line = f"price = {price:g}"
    changed, many = re.subn(r"(?m)^([ \t]*)price[ \t]*=[ \t]*[0-9.eE+_-]+", rf"\g<1>{line}", part, count=1)
    return changed if many else f"{part[: name.end()]}\n{line}{part[name.end() :]}"


def _text(quoted: str) -> str:
    found: Any = json.loads(quoted)
    return str(found)
