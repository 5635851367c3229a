"""Shell completion of crun, from its table of flags: crun completion bash|zsh|fish."""

from __future__ import annotations

from cafs.errors import UsageError, quote
from cafs.options import SWITCH
from runner.flags import GROUPS, VERBS

SHELLS = ("bash", "zsh", "fish")
_IMAGES = ("run", "create")
_CONTAINERS = (
    "start", "stop", "restart", "kill", "rm", "logs", "exec", "attach", "wait", "inspect", "pause", "unpause", "rename", "port",
    "top", "stats", "commit", "diff", "cp",
)  # fmt: skip

_NAMES = r's/.*"Names": *"\([^"]*\)".*/\1/p'
_GROUP = """    {group})
        if [ "$COMP_CWORD" -eq 2 ]; then
            COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
            return
        fi
        verb="$verb ${{COMP_WORDS[2]}}" ;;"""
_BASH = """_crun() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}} flags values
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
        return
    fi
    case $verb in
{groups}
    esac
    case $verb in
{cases}
    *) return ;;
    esac
    case " $values " in *" $before "*) COMPREPLY=($(compgen -f -- "$word")); return ;; esac
    case $word in -*) COMPREPLY=($(compgen -W "$flags" -- "$word")); return ;; esac
    case $verb in
    {images}) COMPREPLY=($(compgen -W "$(cafs-store ls -q 2>/dev/null)" -- "$word")) ;;
    {containers}) COMPREPLY=($(compgen -W "$(crun ps -a --format json 2>/dev/null | sed -n '{names}')" -- "$word")) ;;
    esac
}}
COMP_WORDBREAKS=${{COMP_WORDBREAKS//:/}} # a ref is one word
complete -o default -F _crun crun
complete -o default -F _crun cafs-run
"""


def script(shell: str) -> str:
    """What the shell is to read.  Raises UsageError."""
    if shell not in SHELLS:
        raise UsageError(f"no completion for {quote(shell)}", hint="bash, zsh or fish")
    if shell == "fish":
        return _fish()
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    cases = []
    for verb, (_, _, flags) in VERBS.items():
        names = " ".join([f"--{name}" for name in flags] + [f"-{flag[1]}" for flag in flags.values() if flag[1]])
        values = [f"--{name}" for name, flag in flags.items() if flag[0] != SWITCH]
        values += [f"-{flag[1]}" for flag in flags.values() if flag[0] != SWITCH and flag[1]]
        cases.append(f"    '{verb}') flags='{names} --help' values='{' '.join(values)}' ;;")
    return head + _BASH.format(
        verbs=" ".join([*(verb for verb in VERBS if " " not in verb), *GROUPS]),
        groups="\n".join(_GROUP.format(group=group, verbs=" ".join(_below(group))) for group in GROUPS),
        cases="\n".join(cases),
        images="|".join(_IMAGES),
        containers="|".join(_CONTAINERS),
        names=_NAMES,
    )


def _below(group: str) -> list[str]:
    return [verb.partition(" ")[2] for verb in VERBS if verb.startswith(f"{group} ")]


def _fish() -> str:
    lines = ["complete -c crun -f"]
    lines += [f"complete -c crun -n __fish_use_subcommand -a {group} -d {_quoted(text)}" for group, text in GROUPS.items()]
    for verb, (_, text, flags) in VERBS.items():
        group, _, name = verb.rpartition(" ")
        place = f"'__fish_seen_subcommand_from {group}'" if group else "__fish_use_subcommand"
        lines.append(f"complete -c crun -n {place} -a {name} -d {_quoted(text)}")
        seen = "-n '" + "; and ".join(f"__fish_seen_subcommand_from {word}" for word in verb.split()) + "'"
        for flag, (kind, letter, _, _, what) in flags.items():
            short = f" -s {letter}" if letter else ""
            lines.append(f"complete -c crun {seen} -l {flag}{short}{'' if kind == SWITCH else ' -r'} -d {_quoted(what)}")
    for verbs, command in (
        (_IMAGES, "cafs-store ls -q"),
        (_CONTAINERS, """crun ps -a --format json | string match -rg '"Names": *"([^"]*)"'"""),
    ):
        lines.append(f"complete -c crun -n '__fish_seen_subcommand_from {' '.join(verbs)}' -a \"({_escaped(command)})\"")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
