"""`nas completion`: words that a shell completes, from the parser itself, so that none is kept twice."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mixnas.cli.verbs import Verb

PLACE = 8

SHELLS = ("bash", "zsh")

_SCRIPT = """\
# In ~/.{shell}rc: eval "$(nas completion {shell})"
{before}_nas() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" verb="${{COMP_WORDS[1]}}" least=2 words=""
    case "$verb" in {groups}) verb="$verb ${{COMP_WORDS[2]}}"; least=3 ;; esac
    if [ "$COMP_CWORD" -lt "$least" ]; then
        case "$COMP_CWORD ${{COMP_WORDS[1]}}" in
            1\\ *) words="{verbs}" ;;
{inner}
        esac
    elif [ "${{word#-}}" != "$word" ]; then
        case "$verb" in
{options}
        esac
    else
        case "$verb" in
            # Only what can be the name of a run: compgen expands words as the shell does.
            {with_run}) words="$(ls runs 2>/dev/null | grep -E '^[A-Za-z0-9][A-Za-z0-9._-]*$')" ;;
        esac
    fi
    if [ -n "$words" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _nas nas
"""


def completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas completion`."""
    parser.add_argument("shell", choices=SHELLS, help='which: then eval "$(nas completion bash)" in its start-up file')


def completion(args: argparse.Namespace) -> int:
    """The script that teaches a shell the words of `nas`."""
    from mixnas.cli.main import make_parser

    found = dict(_parsers(make_parser()))
    inner: dict[str, list[str]] = {}
    for words in found:
        group, _, verb = words.partition(" ")
        inner.setdefault(group, []).extend([verb] if verb else [])
    groups = {group: verbs for group, verbs in inner.items() if verbs}

    def lines(pairs: dict[str, list[str]], label: str) -> str:
        return "\n".join(f'            "{label}{name}") words="{" ".join(words)}" ;;' for name, words in pairs.items())

    options = {words: [o for o in parser._option_string_actions if o[:2] == "--"] for words, parser in found.items()}
    runs = [words for words, parser in found.items() if any(_is_run(action) for action in parser._actions)]
    text = _SCRIPT.format(
        shell=args.shell,
        before="autoload -Uz bashcompinit && bashcompinit\n" if args.shell == "zsh" else "",
        groups="|".join(groups),
        verbs=" ".join([*inner, "--help", "--version"]),
        inner=lines(groups, "2 "),
        options=lines(options, ""),
        with_run="|".join(f'"{words}"' for words in runs),
    )
    print(text, end="")
    return 0


def _is_run(action: argparse.Action) -> bool:
    return not action.option_strings and str(action.metavar).startswith("RUN")


def _parsers(parser: argparse.ArgumentParser, before: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser of each verb, by its words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                below = list(_parsers(inner, f"{before}{name} "))
                yield from below or [(f"{before}{name}", inner)]


VERBS = (Verb("completion", "words that a shell completes", completion, completion_arguments),)
