"""Make the vectors of cafs-index(5): NN-*.bad breaks reader rule NN and no other before it, *.ok is valid.

Run by hand when a rule is added; the files are what tests read.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent / "index"
D = "0123456789abcdef" * 4
HEAD = "cafs-index 1 sha256 4194304\n"
LAYER = "cafs-index 1 sha256 4194304 layer\n"
ROOT = "d 755 0 0 0 - - - - /\n"


def index(*lines: str, head: str = HEAD, root: str = ROOT, end: int | None = None) -> str:
    body = root + "".join(line + "\n" for line in lines)
    return head + body + f"end {body.count(chr(10)) if end is None else end}\n"


def f(path: str, size: str = "1", digest: str = D, mode: str = "644", xattrs: str = "-") -> str:
    return f"f {mode} 0 0 0 {size} {digest} {xattrs} - {path}"


GOOD = {
    "smallest": index(),
    "all-types": index(
        "b 660 0 6 0 8:1 - - - /b",
        "c 666 0 0 0 1:3 - - - /c",
        f("/empty", "0", "-"),
        f("/file", mode="4755", xattrs="security.capability=\\x01\\x00,user.a=1\\x2c2"),
        f"F 644 0 0 -1 4194305 {D} - - /large",
        "h - - - - - - - /file /link",
        "l 777 0 0 0 - - - - /minus",
        "p 600 0 0 0 - - - - /pipe",
        "s 600 0 0 0 - - - - /socket",
        "l 777 4294967294 4294967294 9223372036854775807 - - - ../a\\x20b /sym",
        "d 1777 0 0 -9223372036854775808 - - - - /tmp",
        f("/tmp/\\x20\\x5c\\xff\u00fc\u2028"),
        f("/tmp!"),
    ),
    "layer": index("w - - - - - - - - /a/b", "o 755 0 0 0 - - - - /c", f("/c/d"), head=LAYER, root=""),
}
BAD = {
    "01-magic": index().replace("cafs-index", "cafs-lndex"),
    "02-version": index(head="cafs-index 2 sha256 4194304\n"),
    "03-hash": index(head="cafs-index 1 md5 4194304\n"),
    "04-chunk-not-power": index(head="cafs-index 1 sha256 4194305\n"),
    "04-chunk-too-large": index(head="cafs-index 1 sha256 134217728\n"),
    "05-field": index(head="cafs-index 1 sha256 4194304 extra\n"),
    "06-cut": HEAD + ROOT,
    "06-follows": index() + f("/a") + "\nend 2\n",
    "06-no-newline": index()[:-1],
    "07-count": index(end=2),
    "08-line": index(f("/" + "a" * (1 << 20))),
    "09-double-space": index(f("/a").replace(" 0 0 0 ", " 0  0 0 ")),
    "09-nine-fields": index(f"f 644 0 0 0 1 {D} - /a"),
    "09-empty-line": index(""),
    "10-letter": index("x 644 0 0 0 - - - - /a"),
    "10-junk-before-type": index("\x00b 660 0 6 0 8:1 - - - /b"),
    "10-whiteout-in-base": index("w - - - - - - - - /a"),
    "11-leading-zero": index("d 0755 0 0 0 - - - - /a"),
    "11-uid": index("d 755 4294967295 0 0 - - - - /a"),
    "11-gid-large": index("d 755 0 9999999999 0 - - - - /a"),
    "11-mtime": index("d 755 0 0 9223372036854775808 - - - - /a"),
    "11-minus-zero": index("d 755 0 0 -0 - - - - /a"),
    "11-major": index("c 644 0 0 0 4096:0 - - - /a"),
    "11-size": index(f("/a", "01")),
    "12-directory-size": index("d 755 0 0 0 1 - - - /a"),
    "12-no-mode": index(f"f - 0 0 0 1 {D} - - /a"),
    "12-hardlink-mode": index(f("/a"), "h 644 - - - - - - /a /b"),
    "12-file-target": index(f"f 644 0 0 0 1 {D} - t /a"),
    "13-upper-case": index(f("/a", digest=D.upper())),
    "13-short": index(f("/a", digest=D[:-2])),
    "14-empty-with-digest": index(f("/a", "0")),
    "14-no-digest": index(f("/a", "1", "-")),
    "14-file-too-large": index(f("/a", "4194305")),
    "14-chunked-too-small": index(f"F 644 0 0 0 4194304 {D} - - /a"),
    "15-mode": index("l 755 0 0 0 - - - t /a"),
    "15-nul": index("l 777 0 0 0 - - - a\\x00 /a"),
    "15-long": index("l 777 0 0 0 - - - " + "a" * 4096 + " /a"),
    "16-needless": index(f("/\\x61")),
    "16-upper-hex": index(f("/\\xFF")),
    "16-stray": index(f("/a\\b")),
    "16-raw-control": index(f("/a\x01")),
    "16-raw-c1": index(f("/a\u0085")),
    "17-relative": index(f("a")),
    "17-dot": index(f("/.")),
    "17-dot-dot": index("d 755 0 0 0 - - - - /..", f("/../a")),
    "17-empty-name": index(f("//a")),
    "17-slash-at-end": index("d 755 0 0 0 - - - - /a/"),
    "17-nul": index(f("/a\\x00")),
    "17-long-name": index(f("/" + "a" * 256)),
    "18-order": index(f("/b"), f("/a")),
    "18-twice": index(f("/a"), f("/a")),
    "18-component-order": index("d 755 0 0 0 - - - - /a", f("/a!"), f("/a/b")),
    "19-no-root": index(f("/a"), root=""),
    "19-root-is-file": index(root=f("/") + "\n"),
    "19-empty": index(root=""),
    "20-no-parent": index(f("/a/b")),
    "20-parent-is-file": index(f("/a"), f("/a/b")),
    "20-layer-below-file": index(f("/a"), f("/a/b"), head=LAYER, root=""),
    "21-missing": index("h - - - - - - - /b /a"),
    "21-later": index("h - - - - - - - /b /a", f("/b")),
    "21-directory": index("d 755 0 0 0 - - - - /a", "h - - - - - - - /a /b"),
    "21-hardlink": index(f("/a"), "h - - - - - - - /a /b", "h - - - - - - - /b /c"),
    "22-order": index(f("/a", xattrs="user.b=,user.a=")),
    "22-twice": index(f("/a", xattrs="user.a=,user.a=")),
    "22-namespace": index(f("/a", xattrs="trusted.overlay.redirect=x")),
    "22-value": index(f("/a", xattrs="user.a=" + "x" * 65536)),
    "22-no-equals": index(f("/a", xattrs="user.a")),
}

if __name__ == "__main__":
    for kind, table in ((".ok", GOOD), (".bad", BAD)):
        for name, text in table.items():
            (HERE / (name + kind)).write_bytes(text.encode())
    raw = index(f("/aX")).encode().replace(b"/aX", b"/a\xff")
    (HERE / "16-raw-not-utf8.bad").write_bytes(raw)
