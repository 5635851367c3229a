"""Dockerfiles, what they are built from, and what BuildKit makes of them.

tree: path -> 'TYPE[MODE][,UID:GID][=CONTENT or TARGET]', '' if it must not be there.  files: path -> content, or 'dir', or
'->TARGET', '=NAME' for a
hard link, 'mode MODE' of what is there, or 'MODE:content'.  config: keys of the image's config.  error: what is said instead; a place 'Dockerfile:N:' is implied.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    text: str
    files: dict[str, str] = field(default_factory=dict)
    tree: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    error: str = ""
    args: dict[str, str] = field(default_factory=dict)
    target: str = ""
    base: str = "FROM b:1\n"
    allowed: tuple[str, ...] = ()
    secrets: dict[str, str] = field(default_factory=dict)


A = {"a": "A", "b": "B", "sub/c": "C", "sub/deep/d": "D"}
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STAR = {"x1.txt": "1", "x2.txt": "2", "y.md": "3", "sub/x3.txt": "4", "sub/more/x4.txt": "5"}

LEXICAL = [
    Case("a BOM and CRLF", "\ufeffFROM b:1\r\nENV A=1 \\\r\n  B=2\r\n", base="", config={"Env": [PATH, "A=1", "B=2"]}),
    Case(
        "comments between continued lines",
        "RUN echo a \\\n# no\n  > /a \\\n   # no\n && echo b > /b\n",
        tree={"/a": "f=a\n", "/b": "f=b\n"},
    ),
    Case("an empty line in a continuation", "RUN echo a > /a && \\\n\n  echo b > /b\n", tree={"/b": "f=b\n"}),
    Case("a continuation at the end of the file", "ENV A=1 \\", config={"Env": [PATH, "A=1"]}),
    Case("keywords in any case", "env A=1\nEnV B=2\n", config={"Env": [PATH, "A=1", "B=2"]}),
    Case(
        "the escape directive",
        "# escape=`\nFROM b:1\nENV A=a`\n  B=`$C\nRUN echo c:\\d > /e\n",
        base="",
        config={"Env": [PATH, "A=a", "B=$C"]},
        tree={"/e": "f"},
    ),
    Case(
        "an unknown directive ends the directives",
        "# nothing=1\n# escape=`\nFROM b:1\nENV A=a\\\n B=2\n",
        base="",
        config={"Env": [PATH, "A=a", "B=2"]},
    ),
    Case("syntax is only a word", "# syntax=docker/dockerfile:1\nFROM b:1\nENV A=1\n", base="", config={"Env": [PATH, "A=1"]}),
    Case("an escape that is none", "# escape=x\nFROM b:1\n", base="", error="invalid escape character"),
    Case("a directive twice", "# escape=`\n# escape=`\nFROM b:1\n", base="", error="only one escape directive"),
    Case("an unknown instruction", "RUNN echo\n", error="did you mean RUN?"),
    Case("a file of comments", "# nothing\n", base="", error="without instructions"),
    Case("an instruction before FROM", "RUN echo\n", base="", error="FROM comes first"),
    Case("not UTF-8 in RUN", "RUN printf '\udce9' > /a\n", tree={"/a": "f"}),
    Case("a hash in an argument", "ENV A=a#b\n", config={"Env": [PATH, "A=a#b"]}),
    Case("single quotes are no JSON", "CMD ['a', 'b']\n", config={"Cmd": ["/bin/sh", "-c", "['a', 'b']"]}),
    Case("JSON of something else", 'CMD [ "a", [ "b" ] ]\n', error="only words"),
    Case("an unknown flag", "COPY --fron=x a /b\n", error="did you mean --from?"),
    Case("a flag twice", "COPY --from=a --from=b a /b\n", error="given twice"),
    Case("a flag that needs a value", "COPY --chown a /b\n", error="needs a value"),
    Case("a switch with a bad value", "COPY --link=maybe a /b\n", error="true or false"),
]
HEREDOCS = [
    Case("RUN of a heredoc", "RUN <<EOF\necho 1 > /a\necho 2 > /b\nEOF\n", tree={"/a": "f=1\n", "/b": "f=2\n"}),
    Case(
        "RUN of a heredoc with its own shell",
        "RUN <<EOF\n#!/bin/sh\necho $0 > /a\nEOF\n",
        tree={"/a": "f=/dev/pipes/EOF\n", "/dev/pipes": ""},
    ),
    Case(
        "a heredoc given to a command",
        "RUN cat <<EOF > /a && cat <<X > /b\nfrom a\nEOF\nfrom b\nX\n",
        tree={"/a": "f=from a\n", "/b": "f=from b\n"},
    ),
    Case(
        "white space before the end of a heredoc is named",
        "RUN cat << EOF > /a && cat <<- 'X' > /b\nfrom a\nEOF\n\tfrom $b\n\tX\nRUN << EOF\necho 3 > /c\nEOF\nCOPY << \"EOF\" /d\n$d\nEOF\n",
        tree={"/a": "f=from a\n", "/b": "f=from $b\n", "/c": "f=3\n", "/d": "f=$d\n"},
    ),
    Case(
        "a shift is no heredoc",
        "RUN echo $((1 << 2)) > /a\nARG b=1\nRUN a=1; echo $(( a << b )) > /b\n",
        tree={"/a": "f=4\n", "/b": "f=2\n"},
    ),
    Case("tabs are stripped with a dash", "RUN <<-EOF\n\techo 1 > /a\n\tEOF\n", tree={"/a": "f=1\n"}),
    Case("comments in a heredoc stay", "COPY <<EOF /a\n# kept\n\nEOF\n", tree={"/a": "f644=# kept\n\n"}),
    Case(
        "variables in a heredoc of COPY", 'ENV A=1\nCOPY <<EOF /a\n$A ${A:-2} "q" \\$A\nEOF\n', tree={"/a": 'f644=1 1 "q" $A\n'}
    ),
    Case("a quoted heredoc", 'ENV A=1\nCOPY <<"EOF" /a\n$A\nEOF\n', tree={"/a": "f=$A\n"}),
    Case("several heredocs", "COPY <<one <<two /d/\n1\none\n2\ntwo\n", tree={"/d/one": "f=1\n", "/d/two": "f=2\n"}),
    Case("a heredoc with mode and owner", "COPY --chmod=600 --chown=7:8 <<EOF /a\nx\nEOF\n", tree={"/a": "f600,7:8=x\n"}),
    Case("a heredoc without its end", "RUN <<EOF\necho\n", error="heredoc without its end"),
    Case("a heredoc as the destination", "COPY a <<EOF\nEOF\n", files=A, error="destination"),
    Case(
        "a heredoc as a trigger",
        "FROM b:1 AS one\nONBUILD RUN <<EOF\necho 1 > /a\nEOF\nFROM one\n",
        base="",
        tree={"/a": "f=1\n"},
    ),
]
VARIABLES = [
    Case(
        "ENV in two spellings",
        "ENV A a b  c\nENV B=1 C='2 3' D=4\\ 5\n",
        config={"Env": [PATH, "A=a b  c", "B=1", "C=2 3", "D=4 5"]},
    ),
    Case(
        "one snapshot an instruction", "ENV a=hi\nENV a=bye b=$a\nENV c=$a\n", config={"Env": [PATH, "a=bye", "b=hi", "c=bye"]}
    ),
    Case(
        "modifiers",
        "ENV A=abc.tar.gz\nENV B=${A%.*} C=${A%%.*} D=${A#*.} E=${A/abc/x} F=${N:-n} G=${A:+y}\n",
        config={"Env": [PATH, "A=abc.tar.gz", "B=abc.tar", "C=abc", "D=tar.gz", "E=x.tar.gz", "F=n", "G=y"]},
    ),
    Case("a required variable", 'ENV A="${N:?is needed}"\n', error="is needed"),
    Case("a quote that is open", 'ENV A="a\n', error="double quote"),
    Case("a variable replaced keeps its place", "ENV A=1 B=2\nENV A=3\n", config={"Env": [PATH, "A=3", "B=2"]}),
    Case("ENV without a value", "ENV A\n", error="two arguments"),
    Case("ENV with a pair that is none", "ENV A=1 B\n", error="no = in"),
    Case("ARG with a default", "ARG V=1\nRUN echo $V > /a\n", tree={"/a": "f=1\n"}),
    Case("ARG that is given", "ARG V=1\nRUN echo $V > /a\n", args={"V": "2"}, tree={"/a": "f=2\n"}),
    Case("ARG is not in the image", "ARG V=1\n", config={"Env": [PATH]}),
    Case(
        "the later of ENV and ARG counts",
        "ENV V=env W=env\nARG V=arg\nARG W\nRUN echo $V $W > /a\nARG X=arg\nENV X=$X-env\nRUN echo $X > /b\nCOPY <<EOF /c\n$V $W $X\nEOF\n",
        args={"V": "given"},
        tree={"/a": "f=given env\n", "/b": "f=arg-env\n", "/c": "f=given env arg-env\n"},
        config={"Env": [PATH, "V=env", "W=env", "X=arg-env"]},
    ),
    Case(
        "ARG is not there before its line",
        "RUN echo x$V > /a\nARG V=1\nRUN echo x$V > /b\n",
        args={"V": "2"},
        tree={"/a": "f=x\n", "/b": "f=x2\n"},
    ),
    Case("several ARGs a line", "ARG A=1 B=2 C\nENV X=$A$B$C\n", args={"C": "3"}, config={"Env": [PATH, "X=123"]}),
    Case("an ARG of an ARG", "ARG A=1\nARG B=${A}2\nENV X=$B\n", config={"Env": [PATH, "X=12"]}),
    Case("a global ARG for FROM", "ARG TAG=1\nFROM b:$TAG\nENV X=x$TAG\n", base="", config={"Env": [PATH, "X=x"]}),
    Case(
        "a global ARG declared again", "ARG TAG=1\nFROM b:${TAG}\nARG TAG\nENV X=$TAG\n", base="", config={"Env": [PATH, "X=1"]}
    ),
    Case(
        "a stage's default wins over the global one",
        "ARG V=1\nFROM b:1\nARG V=3\nENV X=$V\n",
        base="",
        config={"Env": [PATH, "X=3"]},
    ),
    Case("ARGs go to stages on top", "FROM b:1 AS one\nARG V=1\nFROM one\nENV X=$V\n", base="", config={"Env": [PATH, "X=1"]}),
    Case(
        "ARGs do not go to other stages",
        "FROM b:1 AS one\nARG V=1\nFROM b:1\nENV X=x$V\n",
        base="",
        config={"Env": [PATH, "X=x"]},
    ),
    Case(
        "automatic arguments",
        "ARG TARGETOS\nARG TARGETSTAGE\nENV X=$TARGETOS-$TARGETSTAGE Y=$TARGETARCH\n",
        config={"Env": [PATH, "X=linux-default", "Y="]},
    ),
    Case(
        "proxies reach RUN undeclared",
        "RUN echo x$http_proxy > /a\n",
        args={"http_proxy": "http://p"},
        tree={"/a": "f=xhttp://p\n"},
        config={"Env": [PATH]},
    ),
    Case("an empty FROM", "ARG X\nFROM $X\n", base="", error="is empty"),
    Case("no variables in --from", "ARG S=one\nCOPY --from=$S a /a\n", error="no variables"),
    Case("variables in COPY", "ENV S=sub D=/d\nCOPY $S/c ${D}/\n", files=A, tree={"/d/c": "f=C"}),
    Case(
        "variables in LABEL, USER, WORKDIR, VOLUME, EXPOSE, STOPSIGNAL",
        "ENV A=a P=80 S=TERM\nLABEL $A=l\nWORKDIR /$A\nUSER $A\nVOLUME /$A\nEXPOSE $P/udp\nSTOPSIGNAL $S\n",
        config={
            "Labels": {"a": "l"},
            "WorkingDir": "/a",
            "User": "a",
            "Volumes": {"/a": {}},
            "ExposedPorts": {"80/udp": {}},
            "StopSignal": "TERM",
        },
    ),
    Case("no variables of the builder in CMD", "ENV A=1\nCMD echo $A\n", config={"Cmd": ["/bin/sh", "-c", "echo $A"]}),
    Case(
        "words in EXPOSE",
        "ENV P='80 81'\nEXPOSE $P 90-92\n",
        config={"ExposedPorts": {f"{p}/tcp": {} for p in (80, 81, 90, 91, 92)}},
    ),
]
STAGES = [
    Case(
        "a stage on a stage",
        "FROM b:1 AS one\nRUN echo 1 > /a\nENV A=1\nFROM one\nRUN echo 2 > /b\n",
        base="",
        tree={"/a": "f=1\n", "/b": "f=2\n"},
        config={"Env": [PATH, "A=1"]},
    ),
    Case("names in any case", "FROM b:1 AS One\nRUN echo 1 > /a\nFROM oNe\n", base="", tree={"/a": "f=1\n"}),
    Case("a stage's name is that of an image", "FROM b:1 AS b:1\n", base="", error="not a name"),
    Case(
        "a target", "FROM b:1 AS one\nENV A=1\nFROM b:1 AS two\nENV A=2\n", base="", target="one", config={"Env": [PATH, "A=1"]}
    ),
    Case("a target by number", "FROM b:1\nENV A=1\nFROM b:1\nENV A=2\n", base="", target="0", config={"Env": [PATH, "A=1"]}),
    Case(
        "only what the target needs",
        "FROM b:1 AS broken\nRUN false\nFROM b:1\nENV A=1\n",
        base="",
        config={"Env": [PATH, "A=1"]},
    ),
    Case(
        "COPY --from a stage",
        "FROM b:1 AS one\nRUN mkdir /d && echo 1 > /d/a && chown 7:8 /d/a\nFROM scratch\nCOPY --from=one /d /e\n",
        base="",
        tree={"/e/a": "f,7:8=1\n", "/bin": ""},
    ),
    Case(
        "COPY --from by number", "FROM b:1\nRUN echo 1 > /a\nFROM scratch\nCOPY --from=0 /a /\n", base="", tree={"/a": "f=1\n"}
    ),
    Case("COPY --from an image", "COPY --from=b:1 /etc/passwd /copied\n", tree={"/copied": "f644"}),
    Case(
        "COPY --from a later stage",
        "FROM b:1 AS one\nCOPY --from=two /a /a\nFROM b:1 AS two\n",
        base="",
        target="one",
        error="comes later",
    ),
    Case("COPY --from itself", "FROM b:1 AS one\nCOPY --from=one /a /a\n", base="", error="later than this one"),
    Case("an unknown base", "FROM none:1\n", base="", error="no image 'none:1'"),
    Case("another platform", "FROM --platform=linux/s390x b:1\n", base="", error="nothing is emulated"),
    Case("this platform, spelled otherwise", "FROM --platform=linux/$TARGETARCH/ b:1\n", base="", error="is not a platform"),
    Case(
        "this platform by its machine",
        "ARG M=x86_64\nFROM --platform=${M} docker.io/library/b:1\nENV A=1\n",
        base="",
        config={"Env": [PATH, "A=1"]},
    ),
    Case("this platform", "FROM --platform=$BUILDPLATFORM b:1\nENV A=1\n", base="", config={"Env": [PATH, "A=1"]}),
    Case("FROM with two words", "FROM b:1 one\n", base="", error="AS a name"),
    Case(
        "a name twice: the last one counts",
        "FROM b:1 AS x\nENV A=1\nFROM b:1 AS x\nENV A=2\nFROM x\n",
        base="",
        config={"Env": [PATH, "A=2"]},
    ),
    Case("scratch", "FROM scratch\nCOPY a /a\n", base="", files=A, tree={"/": "d755", "/a": "f=A"}, config={"Env": [PATH]}),
    Case("nothing at all on scratch", "FROM scratch\nENV A=1\n", base="", tree={"/": "d755"}, config={"Env": [PATH, "A=1"]}),
    Case("RUN on scratch", "FROM scratch\nRUN true\n", base="", error="has no programs"),
    Case(
        "ONBUILD runs in the next stage",
        "FROM b:1 AS one\nONBUILD ENV A=1\nONBUILD RUN echo $A > /a\nFROM one\n",
        base="",
        tree={"/a": "f=1\n"},
        config={"Env": [PATH, "A=1"], "OnBuild": None},
    ),
    Case(
        "ONBUILD is kept in the image", "ONBUILD RUN echo\nONBUILD COPY a /a\n", config={"OnBuild": ["RUN echo", "COPY a /a"]}
    ),
    Case("ONBUILD of ONBUILD", "ONBUILD ONBUILD RUN x\n", error="not allowed as a trigger"),
    Case("ONBUILD of FROM", "ONBUILD FROM x\n", error="not allowed as a trigger"),
]
RUN = [
    Case("RUN in a shell", "RUN echo a  'b  c' > /a\n", tree={"/a": "f=a b  c\n"}),
    Case("RUN without a shell", 'RUN ["sh", "-c", "echo $0 > /a", "x"]\n', tree={"/a": "f=x\n"}),
    Case("RUN that fails", "RUN exit 3\n", error="exit code 3"),
    Case("RUN of what is not there", 'RUN ["nothing"]\n', error="not found in the image"),
    Case("RUN without a command", "RUN\n", error="needs a command"),
    Case("RUN in WORKDIR", "WORKDIR /w\nRUN pwd > a\n", tree={"/w/a": "f=/w\n"}),
    Case(
        "RUN as USER",
        "USER joe\nRUN id -u > /tmp/a; id -g >> /tmp/a; echo $HOME >> /tmp/a\n",
        tree={"/tmp/a": "f,1000:1001=1000\n1001\n/home/joe\n"},
    ),
    Case("RUN as a number is no name", "USER 7\nRUN id -u > /tmp/a\n", tree={"/tmp/a": "f,7:0=7\n"}),
    Case("RUN with another SHELL", 'SHELL ["/bin/sh", "-ec"]\nRUN false; true\n', error="exit code 1"),
    Case(
        "SHELL goes into CMD",
        'SHELL ["/bin/x", "-y"]\nCMD a b\n',
        config={"Cmd": ["/bin/x", "-y", "a b"], "Shell": ["/bin/x", "-y"]},
    ),
    Case(
        "what RUN removes is gone", "RUN rm /bin/seq\nRUN test ! -e /bin/seq\n", tree={"/bin/seq": "", "/bin/cat": "l=busybox"}
    ),
    Case(
        "what RUN removes and makes anew",
        "RUN rm -r /home/joe && mkdir /home/joe && touch /home/joe/x\n",
        tree={"/home/joe/x": "f="},
    ),
    Case(
        "what RUN moves",
        "RUN mkdir /d && echo 1 > /d/a && mv /home /house && mv /d /house/e\n",
        tree={"/house/joe": "d755", "/house/e/a": "f=1\n", "/home": "", "/d": ""},
    ),
    Case("no traces of mounts", "RUN true\n", tree={"/etc/resolv.conf": "", "/etc/hosts": "", "/etc/hostname": ""}),
    Case("changes below a VOLUME stay", "RUN mkdir /v\nVOLUME /v\nRUN echo 1 > /v/a\n", tree={"/v/a": "f=1\n"}),
    Case("processes that RUN leaves are ended", "RUN sleep 1000 & echo 1 > /a\n", tree={"/a": "f=1\n"}),
    Case("the fixed host name", "RUN hostname > /a\n", tree={"/a": "f=buildkitsandbox\n"}),
    Case(
        "links, modes and owners",
        "RUN ln -s /x /l && ln /etc/passwd /p && touch /s && chown 5:6 /s && chmod 4711 /s\n",
        tree={"/l": "l=/x", "/s": "f4711,5:6=", "/p": "f644"},
    ),
    Case("no network", "RUN --network=none ip -o link | grep -c . > /a\n", tree={"/a": "f=1\n"}),
    Case("the host's network needs leave", "RUN --network=host true\n", error="not allowed here"),
    Case("the host's network with leave", "RUN --network=host true\n", allowed=("network.host",)),
    Case("an unknown network", "RUN --network=x true\n", error="--network is"),
    Case("all rights need leave", "RUN --security=insecure true\n", error="not allowed here"),
    Case("all rights with leave", "RUN --security=insecure mount -t tmpfs t /tmp\n", allowed=("security.insecure",)),
    Case("mounting without leave", "RUN mount -t tmpfs t /tmp\n", error="exit code"),
    Case("an unknown security mode", "RUN --security=x true\n", error="--security is"),
]
MOUNTS = [
    Case(
        "a bind of the context",
        "RUN --mount=target=/c cat /c/a > /a; touch /c/x || echo ro > /b\n",
        files=A,
        tree={"/a": "f=A", "/b": "f=ro\n", "/c": ""},
    ),
    Case(
        "a bind of part of the context",
        "RUN --mount=type=bind,source=sub,target=/c cat /c/c > /a; test ! -e /c/a\n",
        files=A,
        tree={"/a": "f=C"},
    ),
    Case("a bind of a file", "RUN --mount=source=a,target=/c/file cat /c/file > /a\n", files=A, tree={"/a": "f=A", "/c": ""}),
    Case(
        "a bind that may be written to is thrown away",
        "RUN --mount=target=/c,rw echo x > /c/a && cp /c/a /a\nRUN --mount=target=/c cat /c/a > /b\n",
        files=A,
        tree={"/a": "f=x\n", "/b": "f=A"},
    ),
    Case(
        "a bind from a stage",
        "FROM b:1 AS one\nRUN echo 1 > /a\nFROM b:1\nRUN --mount=from=one,source=/a,target=/m cat /m > /b\n",
        base="",
        tree={"/b": "f=1\n", "/m": ""},
    ),
    Case("a bind from an image", "RUN --mount=from=b:1,source=/etc,dst=/m cat /m/passwd > /b\n", tree={"/b": "f"}),
    Case(
        "a bind relative to WORKDIR",
        "WORKDIR /w\nRUN --mount=target=m cat m/a > a\n",
        files=A,
        tree={"/w/a": "f=A", "/w/m": ""},
    ),
    Case("a bind of what is not there", "RUN --mount=source=none,target=/m true\n", files=A, error="no 'none'"),
    Case("a bind on /", "RUN --mount=target=/ true\n", files=A, error="cannot be on /"),
    Case("a bind without a target and WORKDIR", "RUN --mount=type=bind true\n", files=A, error="cannot be on /"),
    Case(
        "mounts without a target are on WORKDIR",
        "FROM b:1 AS one\nRUN mkdir /s && echo 1 > /s/f\nFROM b:1\nWORKDIR /w\nRUN --mount=from=one,source=/s cat f > /got\n"
        "RUN --mount=type=tmpfs touch t && ls > /names\nRUN --mount=type=cache touch c && ls > /cached\n",
        base="",
        tree={"/got": "f=1\n", "/names": "f=t\n", "/cached": "f=c\n", "/w/t": "", "/w/c": ""},
    ),
    Case(
        "a link in a stage leads nowhere else",
        "FROM b:1 AS one\nRUN ln -s /etc /link\nFROM b:1\nRUN --mount=from=one,source=/link,target=/m test -e /m/passwd && test ! -e /m/hostname\n",
        base="",
    ),
    Case(
        "a cache is kept and not in the layer",
        "RUN --mount=type=cache,target=/k echo 1 >> /k/f\nRUN --mount=type=cache,target=/k cat /k/f > /a\n",
        tree={"/a": "f", "/k": ""},
    ),
    Case(
        "a cache by its id",
        "RUN --mount=type=cache,id=q,target=/k echo 1 > /k/f\nRUN --mount=type=cache,id=q,target=/other,ro cp /other/f /a\n",
        tree={"/a": "f=1\n"},
    ),
    Case(
        "a cache with a mode and an owner",
        "RUN --mount=type=cache,id=m,target=/k,mode=0700,uid=7,gid=8 stat -c %a:%u:%g /k > /a\n",
        tree={"/a": "f=700:7:8\n"},
    ),
    Case(
        "a cache that is seeded",
        "RUN --mount=type=cache,id=seeded,target=/k,from=b:1,source=/etc cat /k/passwd > /a\n",
        tree={"/a": "f", "/k": ""},
    ),
    Case(
        "caches of one id are apart if their owners, modes or first contents are",
        "RUN --mount=type=cache,id=apart,target=/k echo root > /k/f && chmod 700 /k\n"
        "RUN --mount=type=cache,id=apart,target=/k,uid=7,gid=8 stat -c %u:%g /k > /a; ls /k >> /a\n"
        "RUN --mount=type=cache,id=apart,target=/k,from=b:1,source=/etc ls /k | grep -c passwd > /b\n"
        "RUN --mount=type=cache,id=apart,target=/k,from=b:1,source=/bin ls /k | grep -c passwd > /c; true\n"
        "RUN --mount=type=cache,id=apart,target=/k cat /k/f > /d\n",
        tree={"/a": "f=7:8\n", "/b": "f=1\n", "/c": "f=0\n", "/d": "f=root\n"},
    ),
    Case("an id of a cache that climbs", "RUN --mount=type=cache,id=../../x,target=/k echo 1 > /k/f\n", tree={"/k": ""}),
    Case("an unknown sharing", "RUN --mount=type=cache,target=/k,sharing=x true\n", error="sharing is"),
    Case("a tmpfs", "RUN --mount=type=tmpfs,target=/t,size=1m touch /t/x && grep ' /t tmpfs' /proc/mounts\n", tree={"/t": ""}),
    Case(
        "a secret",
        "RUN --mount=type=secret,id=s cat /run/secrets/s | wc -c > /a; stat -c %a /run/secrets/s >> /a\n",
        secrets={"s": "very secret"},
        tree={"/a": "f=11\n400\n", "/run": ""},
    ),
    Case(
        "a secret elsewhere",
        "RUN --mount=type=secret,id=s,target=/k,mode=0444,uid=7 stat -c %a:%u /k > /a\n",
        secrets={"s": "very secret"},
        tree={"/a": "f=444:7\n", "/k": ""},
    ),
    Case(
        "a secret as a variable",
        "RUN --mount=type=secret,id=s,env=S test $S = quite-secret && test ! -e /run/secrets/s\n",
        secrets={"s": "quite-secret"},
    ),
    Case("a secret that is not given", "RUN --mount=type=secret,id=s test ! -e /run/secrets/s\n"),
    Case("a secret that is needed", "RUN --mount=type=secret,id=s,required true\n", error="is required"),
    Case(
        "a secret that is left behind",
        "RUN --mount=type=secret,id=s cp /run/secrets/s /tmp/left\n",
        secrets={"s": "very secret"},
        error="secret 's' is in '/tmp/left'",
    ),
    Case("an agent that is needed", "RUN --mount=type=ssh,required true\n", error="is required"),
    Case("an unknown type", "RUN --mount=type=x,target=/t true\n", error="unknown mount type"),
    Case("a field of another type", "RUN --mount=type=bind,target=/t,sharing=locked true\n", files=A, error="has no 'sharing'"),
    Case(
        "a field that would be an option",
        "RUN --mount=type=bind,target=/t,bind-propagation=shared true\n",
        files=A,
        error="has no 'bind-propagation'",
    ),
    Case("fields in any case, and aliases", "RUN --mount=TYPE=bind,SRC=a,DST=/t,RO cp /t /a\n", files=A, tree={"/a": "f=A"}),
    Case("no variables in from", "RUN --mount=from=$X,target=/t true\n", error="no variables"),
]
COPY = [
    Case("a file to a name", "COPY a /x\n", files=A, tree={"/x": "f644=A"}),
    Case("a file into a directory", "COPY a /d/\n", files=A, tree={"/d": "d755", "/d/a": "f=A"}),
    Case("a file into a directory that is there", "COPY a /home\n", files=A, tree={"/home/a": "f=A"}),
    Case("files into a directory", "COPY a b /d/\n", files=A, tree={"/d/a": "f=A", "/d/b": "f=B"}),
    Case("files without a slash", "COPY a b /d\n", files=A, tree={"/d/a": "f=A", "/d/b": "f=B"}),
    Case("the content of a directory", "COPY sub /d\n", files=A, tree={"/d/c": "f=C", "/d/deep/d": "f=D", "/d/sub": ""}),
    Case("all", "COPY . /d\n", files=A, tree={"/d/a": "f=A", "/d/sub/deep/d": "f=D", "/d/Dockerfile": "f"}),
    Case(
        "into WORKDIR",
        "WORKDIR /w\nCOPY a .\nCOPY b ./\nCOPY sub/c x/\n",
        files=A,
        tree={"/w/a": "f=A", "/w/b": "f=B", "/w/x/c": "f=C"},
    ),
    Case("into the empty destination", 'WORKDIR /w\nCOPY ["a", ""]\n', files=A, tree={"/w/a": "f=A"}),
    Case("names with spaces", 'COPY ["a b", "/c d/"]\n', files={"a b": "x"}, tree={"/c d/a b": "f=x"}),
    Case("modes are kept", "COPY x /x\n", files={"x": "755:#!/bin/sh"}, tree={"/x": "f755=#!/bin/sh"}),
    Case("owners are root", "USER 7\nCOPY a /x\n", files=A, tree={"/x": "f,0:0=A"}),
    Case(
        "--chown of names",
        "COPY --chown=joe a /x\nCOPY --chown=joe:extra b /y\n",
        files=A,
        tree={"/x": "f,1000:1001=A", "/y": "f,1000:2000=B"},
    ),
    Case(
        "--chown of numbers",
        "COPY --chown=5 a /x\nCOPY --chown=7:9 sub /y\n",
        files=A,
        tree={"/x": "f,5:5=A", "/y/deep/d": "f,7:9=D", "/y": "d,7:9"},
    ),
    Case("--chown of nobody", "COPY --chown=nobody a /x\n", files=A, error="no user 'nobody'"),
    Case("--chmod", "COPY --chmod=0400 sub /x\n", files=A, tree={"/x/c": "f400=C", "/x/deep": "d400"}),
    Case(
        "--chmod of letters",
        "COPY --chmod=u=rwX,go=rX sub /x\n",
        files={"sub/c": "600:C", "sub/e": "700:E"},
        tree={"/x/c": "f644=C", "/x/e": "f755=E"},
    ),
    Case("--chmod of nothing", "COPY --chmod=9 a /x\n", files=A, error="not a mode"),
    Case(
        "a wildcard",
        "COPY *.txt /d/\n",
        files=STAR,
        tree={"/d/x1.txt": "f=1", "/d/x2.txt": "f=2", "/d/y.md": "", "/d/x3.txt": ""},
    ),
    Case("a wildcard in a directory", "COPY s*/x?.txt /d/\n", files=STAR, tree={"/d/x3.txt": "f=4"}),
    Case(
        "wildcards are of characters",
        "COPY ?.txt /a/\nCOPY [à-ü].txt /b/\nCOPY [^e]x /c/\nCOPY . /d/\n",
        files={"é.txt": "1", "e.txt": "2", "éx": "3", "\udcffx": "4", "ign/é": "5", "ign/éé": "6", ".dockerignore": "ign/?\n"},
        tree={
            "/a/é.txt": "f=1",
            "/a/e.txt": "f=2",
            "/b/é.txt": "f=1",
            "/b/e.txt": "",
            "/c/éx": "f=3",
            "/c/\udcffx": "f=4",
            "/d/ign/é": "",
            "/d/ign/éé": "f=6",
        },
    ),
    Case("a class", "COPY x[2-9].txt /d/\n", files=STAR, tree={"/d/x2.txt": "f=2", "/d/x1.txt": ""}),
    Case("an escaped wildcard", "COPY x\\\\*y /d/\n", files={"x*y": "1", "xay": "2"}, tree={"/d/x*y": "f=1", "/d/xay": ""}),
    Case("a wildcard without a match", "COPY none* /d/\n", files=A, tree={"/d": ""}),
    Case("a name without a match", "COPY none /d/\n", files=A, error="no 'none'"),
    Case("climbing sources", "COPY ../../a /x\nCOPY /sub/../b /y\n", files=A, tree={"/x": "f=A", "/y": "f=B"}),
    Case("climbing destinations", "COPY a /../../x\n", files=A, tree={"/x": "f=A"}),
    Case("a link that is named is followed", "COPY l /x\n", files={"a": "A", "l": "->a"}, tree={"/x": "f=A"}),
    Case("a link in a directory stays", "COPY d /x\n", files={"d/l": "->../a", "a": "A"}, tree={"/x/l": "l=../a"}),
    Case(
        "a link out of the context leads nowhere",
        "COPY l /x\n",
        files={"l": "->/etc/passwd"},
        error="link to what is not there",
    ),
    Case("a link to a directory", "COPY l /x\n", files={"d/a": "A", "l": "->d"}, tree={"/x/a": "f=A"}),
    Case(
        "a destination that is a link is followed",
        "RUN mkdir /real && ln -s /real /link\nCOPY a /link/\n",
        files=A,
        tree={"/real/a": "f=A", "/link": "l=/real"},
    ),
    Case(
        "a link in the destination is replaced, one that is the destination is followed",
        "RUN mkdir /d && echo orig > /t && ln -s /t /d/a && ln -s /t /d/b && ln -s /d /e\nCOPY a /d/\nCOPY a b /e/\n"
        "RUN echo orig2 > /t2 && ln -s /t2 /l\nCOPY a /l\n",
        files=A,
        tree={"/d/a": "f=A", "/d/b": "f=B", "/t": "f=orig\n", "/l": "l=/t2", "/t2": "f=A"},
    ),
    Case(
        "a link that climbs stays in the image",
        "RUN ln -s ../../../../etc /link\nCOPY a /link/new\n",
        files=A,
        tree={"/etc/new": "f=A"},
    ),
    Case("a file over a directory", "COPY a /d\nCOPY sub/c /home/joe\n", files=A, tree={"/home/joe/c": "f=C"}),
    Case("a directory over a file", "COPY a /x\nCOPY sub /x\n", files=A, error="is not a directory"),
    Case("a file below a file", "COPY a /x\nCOPY b /x/y\n", files=A, error="is not a directory"),
    Case(
        "directories are merged",
        "COPY sub /d\nCOPY other /d\n",
        files={**A, "other/e": "E", "other/deep/f": "F"},
        tree={"/d/c": "f=C", "/d/e": "f=E", "/d/deep/d": "f=D", "/d/deep/f": "f=F"},
    ),
    Case(
        "a directory that is there keeps its attributes",
        "RUN mkdir -m 700 /d && chown 5:6 /d\nCOPY sub /d\n",
        files=A,
        tree={"/d": "d700,5:6", "/d/c": "f=C"},
    ),
    Case("--link", "COPY --link a /d/x\n", files=A, tree={"/d/x": "f=A", "/d": "d755"}),
    Case("--parents", "COPY --parents sub/deep/d a /x/\n", files=A, tree={"/x/sub/deep/d": "f=D", "/x/a": "f=A"}),
    Case("--parents with a pivot", "COPY --parents sub/./deep/d /x/\n", files=A, tree={"/x/deep/d": "f=D", "/x/sub": ""}),
    Case(
        "--parents with **",
        "COPY --parents **/*.txt /x/\n",
        files=STAR,
        tree={"/x/x1.txt": "f=1", "/x/sub/x3.txt": "f=4", "/x/sub/more/x4.txt": "f=5", "/x/y.md": ""},
    ),
    Case(
        "--exclude",
        "COPY --exclude=*.md --exclude=sub . /x/\n",
        files=STAR,
        tree={"/x/x1.txt": "f=1", "/x/y.md": "", "/x/sub": ""},
    ),
    Case(
        "--exclude with an exception",
        "COPY --exclude=* --exclude=!x2.txt . /x/\n",
        files=STAR,
        tree={"/x/x2.txt": "f=2", "/x/x1.txt": ""},
    ),
    Case("COPY without a destination", "COPY a\n", files=A, error="needs a source and a destination"),
    Case("COPY of a URL", "COPY http://127.0.0.1:1/x /x\n", files=A, error="only ADD"),
    Case(
        "names of one file stay that",
        "RUN mkdir /d && echo 1 > /d/a && ln /d/a /d/b\nCOPY --from=b:1 /etc/group /g\n",
        tree={"/d/b": "f=1\n", "/g": "f644"},
    ),
]
ADD = [
    Case("ADD of a file", "ADD a /x\n", files=A, tree={"/x": "f=A"}),
    Case(
        "ADD of an archive, by its content",
        "ADD t.bin /x\n",
        files={"t.bin": "TAR"},
        tree={"/x/in/f": "f640,3:4=in", "/x/l": "l=in/f", "/x/t.bin": ""},
    ),
    Case("ADD of a compressed archive", "ADD t.gz /x/\n", files={"t.gz": "TGZ"}, tree={"/x/in/f": "f640,3:4=in"}),
    Case("ADD of an archive with an owner", "ADD --chown=5:6 t /x/\n", files={"t": "TAR"}, tree={"/x/in/f": "f,5:6=in"}),
    Case("ADD of an archive as it is", "ADD --unpack=false t /x\n", files={"t": "TAR"}, tree={"/x": "f", "/x/in": ""}),
    Case("ADD of what only has the name", "ADD t.tar.gz /x\n", files={"t.tar.gz": "no archive"}, tree={"/x": "f=no archive"}),
    Case(
        "an archive over what is there",
        "RUN mkdir -m 700 /x\nADD t /x\n",
        files={"t": "TAR"},
        tree={"/x": "d700", "/x/in/f": "f=in"},
    ),
    Case(
        "a link in the image leads an archive nowhere else",
        "RUN mkdir /x && ln -s /home /x/in\nADD t /x\n",
        files={"t": "TAR"},
        tree={"/home/f": "f=in"},
    ),
    Case(
        "an archive replaces what is of another kind",
        "RUN mkdir -p /x/in /x/l/old && echo 1 > /x/l/old/f && mkdir /y && echo 2 > /y/in\nADD t /x\nADD t /y\n",
        files={"t": "TAR"},
        tree={"/x/l": "l=in/f", "/x/l/old": "", "/x/in/f": "f=in", "/y/in": "d", "/y/in/f": "f=in"},
    ),
    Case(
        "what two archives replace in turn",
        "RUN mkdir -p /x/l/old /x/in/old\nADD t u /x/\n",
        files={"t": "TAR", "u": "TURNED"},
        tree={"/x/l": "d", "/x/l/old": "", "/x/l/g": "f=g", "/x/in": "l=l", "/x/in/old": ""},
    ),
    Case("an archive that climbs", "ADD t /x/\n", files={"t": "EVIL"}, error="has '..' in it"),
    Case(
        "an archive with absolute names",
        "ADD t /x/\n",
        files={"t": "ABSOLUTE"},
        tree={"/x/etc/passwd": "f=evil", "/etc/passwd": "f"},
    ),
    Case(
        "an archive that goes through its own link",
        "ADD t /x/\n",
        files={"t": "THROUGH"},
        tree={"/x/out": "l=/etc", "/x/out/passwd": ""},
    ),
    Case("COPY unpacks nothing", "COPY t /x\n", files={"t": "TAR"}, tree={"/x": "f"}),
    Case("a checksum of what is no URL", "ADD --checksum=sha256:00 a /x\n", files=A, error="--checksum is for"),
    Case("ADD of several", "ADD a t /x/\n", files={**A, "t": "TAR"}, tree={"/x/a": "f=A", "/x/in/f": "f=in"}),
]
IGNORE = [
    Case(
        "a name",
        "COPY . /d\n",
        files={**A, ".dockerignore": "a\nsub/deep\n"},
        tree={"/d/a": "", "/d/b": "f=B", "/d/sub/c": "f=C", "/d/sub/deep": ""},
    ),
    Case(
        "comments and blanks", "COPY . /d\n", files={**A, ".dockerignore": "# b\n\n  a  \n"}, tree={"/d/a": "", "/d/b": "f=B"}
    ),
    Case("a leading slash", "COPY . /d\n", files={**A, ".dockerignore": "/a\n"}, tree={"/d/a": ""}),
    Case(
        "an exception", "COPY . /d\n", files={**A, ".dockerignore": "*\n!b\n"}, tree={"/d/b": "f=B", "/d/a": "", "/d/sub": ""}
    ),
    Case(
        "an exception in a directory",
        "COPY . /d\n",
        files={**A, ".dockerignore": "sub\n!sub/deep/d\n"},
        tree={"/d/sub/deep/d": "f=D", "/d/sub/c": ""},
    ),
    Case(
        "the last rule counts",
        "COPY . /d\n",
        files={**A, ".dockerignore": "!a\n*\n!sub\nsub/deep\n"},
        tree={"/d/a": "", "/d/sub/c": "f=C", "/d/sub/deep": ""},
    ),
    Case(
        "any depth",
        "COPY . /d\n",
        files={**STAR, ".dockerignore": "**/*.txt\n"},
        tree={"/d/x1.txt": "", "/d/sub/x3.txt": "", "/d/y.md": "f=3"},
    ),
    Case(
        "not below a directory",
        "COPY . /d\n",
        files={**STAR, ".dockerignore": "*.txt\n"},
        tree={"/d/x1.txt": "", "/d/sub/x3.txt": "f=4"},
    ),
    Case("what is ignored cannot be named", "COPY a /d\n", files={**A, ".dockerignore": "a\n"}, error="no 'a'"),
    Case(
        "the Dockerfile may be ignored",
        "COPY . /d\n",
        files={**A, ".dockerignore": "Dockerfile\n.dockerignore\n"},
        tree={"/d/Dockerfile": "", "/d/a": "f=A"},
    ),
    Case(
        "an ignore file of its own",
        "COPY . /d\n",
        files={**A, "Dockerfile.dockerignore": "a\n", ".dockerignore": "b\n"},
        tree={"/d/a": "", "/d/b": "f=B"},
    ),
    Case("a lone exclamation mark", "COPY . /d\n", files={**A, ".dockerignore": "!\n"}, error="a lone '!'"),
    Case(
        "not for --from",
        "FROM b:1 AS one\nRUN echo 1 > /a\nFROM b:1\nCOPY --from=one /a /x\n",
        base="",
        files={".dockerignore": "a\n"},
        tree={"/x": "f=1\n"},
    ),
    Case(
        "not for what a bind shows either",
        "RUN --mount=target=/c ls /c > /l\n",
        files={"a": "A", "b": "B", ".dockerignore": "a\nDockerfile\n.dockerignore\n"},
        tree={"/l": "f=b\n"},
    ),
]
METADATA = [
    Case("CMD in two forms", 'CMD ["a", "b"]\n', config={"Cmd": ["a", "b"]}),
    Case("the last CMD counts", "CMD a\nCMD b\n", config={"Cmd": ["/bin/sh", "-c", "b"]}),
    Case("ENTRYPOINT forgets an inherited CMD", 'FROM b:1 AS one\nCMD ["a"]\nFROM one\nENTRYPOINT ["e"]\n', base="", config={"Entrypoint": ["e"], "Cmd": None}),
    Case("ENTRYPOINT keeps the stage's CMD", 'CMD ["a"]\nENTRYPOINT ["e"]\n', config={"Entrypoint": ["e"], "Cmd": ["a"]}),
    Case("ENTRYPOINT of nothing", 'ENTRYPOINT ["e"]\nENTRYPOINT []\n', config={"Entrypoint": []}),
    Case("WORKDIR adds up", "WORKDIR /a\nWORKDIR b\nWORKDIR ../c\n", config={"WorkingDir": "/a/c"}, tree={"/a/b": "d755", "/a/c": "d755"}),
    Case("WORKDIR is the user's", "USER joe\nWORKDIR /w/x\n", tree={"/w/x": "d755,1000:1001"}),
    Case("USER", "USER joe:extra\n", config={"User": "joe:extra"}),
    Case("LABEL", "LABEL a=1 b='2 3'\nLABEL a=4 \"c.d\"=5\n", config={"Labels": {"a": "4", "b": "2 3", "c.d": "5"}}),
    Case("VOLUME", 'VOLUME /a /b\nVOLUME ["/c"]\n', config={"Volumes": {"/a": {}, "/b": {}, "/c": {}}}),
    Case("VOLUME of nothing", "VOLUME []\n", error="needs a path"),
    Case("EXPOSE", "EXPOSE 80 81/udp\n", config={"ExposedPorts": {"80/tcp": {}, "81/udp": {}}}),
    Case("EXPOSE of a word", "EXPOSE x\n", error="not a port"),
    Case("STOPSIGNAL", "STOPSIGNAL SIGINT\n", config={"StopSignal": "SIGINT"}),
    Case("STOPSIGNAL of nothing", "STOPSIGNAL a-b\n", error="not a signal"),
    Case("HEALTHCHECK", 'HEALTHCHECK --interval=5s --timeout=1m30s --retries=2 CMD ["x", "y"]\n', config={"Healthcheck": {"Test": ["CMD", "x", "y"], "Interval": 5 * 10**9, "Timeout": 90 * 10**9, "Retries": 2}}),
    Case("HEALTHCHECK in a shell", "HEALTHCHECK CMD x y\n", config={"Healthcheck": {"Test": ["CMD-SHELL", "x y"]}}),
    Case("HEALTHCHECK NONE", "HEALTHCHECK NONE\n", config={"Healthcheck": {"Test": ["NONE"]}}),
    Case("HEALTHCHECK of nothing", "HEALTHCHECK CMD\n", error="needs NONE, or CMD"),
    Case("HEALTHCHECK too often", "HEALTHCHECK --interval=1us CMD x\n", error="less than a millisecond"),
    Case("SHELL of words", "SHELL /bin/bash\n", error="JSON array"),
    Case("a base's config is inherited", "FROM b:1 AS one\nENV A=1\nLABEL l=1\nUSER 7\nWORKDIR /w\nEXPOSE 1\nFROM one\n", base="", config={"Env": [PATH, "A=1"], "Labels": {"l": "1"}, "User": "7", "WorkingDir": "/w", "ExposedPorts": {"1/tcp": {}}}),
]  # fmt: skip
FOUND = [
    Case(
        "names of one file, and a later source over the first",
        "COPY d1 d2 /dst/\n",
        files={"d1/x": "one", "d1/y": "=d1/x", "d2/x": "two"},
        tree={"/dst/x": "f=two", "/dst/y": "f=one"},
    ),
    Case(
        "a directory of the context over a link of the image",
        "RUN mkdir -p /dst/real && ln -s real /dst/lib\nCOPY src /dst\n",
        files={"src/lib/foo": "F"},
        tree={"/dst/lib": "l=real", "/dst/real/foo": "f=F"},
    ),
    Case(
        "--parents through a link of the context",
        "COPY --parents link/f /dst/\n",
        files={"dir/f": "F", "link": "->dir"},
        tree={"/dst/link": "d", "/dst/link/f": "f=F"},
    ),
    Case(
        "--parents over a link of the image",
        "RUN mkdir /usr && ln -s usr /lib\nCOPY --parents lib/f /\n",
        files={"lib/f": "F"},
        tree={"/lib": "l=usr", "/usr/f": "f=F"},
    ),
    Case(
        "an exception that is a second name",
        "COPY . /w/\n",
        files={"a.md": "A", "b.txt": "=a.md", ".dockerignore": "*\n!**/*.txt\n"},
        tree={"/w/b.txt": "f=A", "/w/a.md": ""},
    ),
    Case(
        "an archive whose links change places",
        "RUN mkdir /zz && ln -s zz /dst\nADD t /\n",
        files={"t": "LINKS"},
        tree={"/zz/f": "f=f", "/a": "f=f"},
    ),
    Case(
        "a wildcard that finds a link out of its directory",
        "COPY d/*.txt /w/\n",
        files={"d/a.txt": "->../o/a.txt", "o/a.txt": "A"},
        tree={"/w/a.txt": "f=A"},
    ),
    Case(
        "--link goes through no link",
        "RUN mkdir /usr && ln -s usr /lib\nCOPY --link a /lib/a\n",
        files=A,
        tree={"/lib": "d", "/lib/a": "f=A", "/usr/a": ""},
    ),
    Case("--exclude is relative to the source", "COPY --exclude=c sub /o/\n", files=A, tree={"/o/c": "", "/o/deep/d": "f=D"}),
    Case("--exclude of files that are named", "COPY --exclude=b a b /o/\n", files=A, tree={"/o/a": "f=A", "/o/b": ""}),
    Case(
        "a new destination has the mode of any",
        "RUN true\nCOPY d /new\n",
        files={"d/a": "A", "d": "mode 700"},
        tree={"/new": "d755", "/new/a": "f=A"},
    ),
    Case("an escaped wildcard without a match", "COPY a\\\\*b /x\n", files=A, error="no 'a"),
    Case(
        "no traces of mounts on links that lead nowhere",
        "COPY etc /etc\nRUN true\n",
        files={"etc/resolv.conf": "->../run/resolve/stub.conf"},
        tree={"/etc/resolv.conf": "l=../run/resolve/stub.conf", "/run": ""},
    ),
    Case(
        "two names of a cache that is locked",
        "RUN --mount=type=cache,id=two,target=/x,sharing=locked --mount=type=cache,id=two,target=/y,sharing=locked echo 1 > /x/f; cp /y/f /a\n",
        tree={"/a": "f=1\n"},
    ),
    Case("a tmpfs from which programs run", "RUN --mount=type=tmpfs,target=/t cp /bin/busybox /t/true && /t/true\n"),
    Case(
        "a bind that may be written to keeps its owners",
        "FROM b:1 AS one\nRUN mkdir /d && chown 1000 /d && mkfifo /d/p || true\nFROM b:1\nUSER 1000\nRUN --mount=from=one,source=/d,target=/m,rw touch /m/f\n",
        base="",
    ),
    Case(
        "a secret as the name of a file",
        "RUN --mount=type=secret,id=s touch /$(cat /run/secrets/s)\n",
        secrets={"s": "very-secret"},
        error="secret 's' is in",
    ),
    Case(
        "a secret as what a link leads to",
        "RUN --mount=type=secret,id=s ln -s $(cat /run/secrets/s) /l\n",
        secrets={"s": "very-secret"},
        error="secret 's' is in",
    ),
    Case("files of the host after FROM", "FROM oci:/tmp\n", base="", error="oci:/tmp"),
    Case(
        "an ignore file that is a link out",
        "COPY . /d\n",
        files={"a": "A", ".dockerignore": "->/etc/passwd"},
        tree={"/d/a": "f=A"},
    ),
    Case(
        "a trigger that needs a stage",
        "FROM b:1 AS builder\nRUN echo 1 > /made\nFROM b:1 AS base\nONBUILD COPY --from=builder /made /got\nFROM base\n",
        base="",
        tree={"/got": "f=1\n"},
    ),
    Case("a trigger that is none", "ONBUILD FOO a\n", error="unknown instruction 'FOO'"),
    Case("a number that is none", "COPY --from=\u00b2 a /x\n", error="'\u00b2'"),
    Case(
        "no variable of the caller in place of ENV",
        "ENV HTTP_PROXY=aaa\nRUN echo $HTTP_PROXY > /p\n",
        args={"HTTP_PROXY": "bbb"},
        tree={"/p": "f=aaa\n"},
    ),
]
CASES = [*LEXICAL, *HEREDOCS, *VARIABLES, *STAGES, *RUN, *MOUNTS, *COPY, *ADD, *IGNORE, *METADATA, *FOUND]
