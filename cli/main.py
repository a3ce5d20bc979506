"""The command line, `nas`: thin. It finds the verbs in the files of this folder, parses their words and calls them."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from mixnas import cli
from mixnas.cli.streams import Stream, guarded
from mixnas.cli.verbs import Group, Verb, as_given
from mixnas.search_space.errors import NasError, StoppedEarly, machine_fault, nearest, shown, visible
from mixnas.search_space.extensions import name_extensions
from mixnas.search_space.files import load_yaml

EXIT_STATUS = """\
exit status: 0 done; 1 failed; 2 wrong usage or configuration; 3 nothing feasible under the constraints;
4 stopped early and can be resumed; 5 a file failed its integrity check."""


class _Parser(argparse.ArgumentParser):
    """Names what is nearest to a word that is not known; takes no option for another that only begins like it."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **about})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            text = f"{value!r} is not known.{nearest(value, known)} Allowed: {', '.join(known)}"
            raise argparse.ArgumentError(action, text)

    def parse_all(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """`parse_args`, with the options of the verb that was called to choose the nearest from."""
        args, rest = self.parse_known_args(argv)
        if rest:
            of: argparse.ArgumentParser = getattr(args, "parser", None) or self
            near = nearest(rest[0].partition("=")[0], of._option_string_actions)
            of.error(f"{rest[0]!r} is not known.{near}")
        return args

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}{'' if message.endswith(('?', '.')) else '.'} See: {self.prog} --help\n")


def _common() -> argparse.ArgumentParser:
    """Flags that every verb has."""
    common = _Parser(add_help=False)
    common.add_argument("-q", "--quiet", action="store_true", help="no progress")
    common.add_argument("-v", "--verbose", action="store_true", help="more on stderr: every trial, tracebacks")
    common.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR does the same)")
    common.add_argument("--json", action="store_true", help="answer as JSON")
    own = "a module of your own that registers operators, strategies or formats; may come again"
    common.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help=own)
    common.add_argument("--runs", default="runs", metavar="DIR", help="the directory of all runs (default: runs)")
    return common


def find_verbs() -> list[Verb | Group]:
    """The verbs of all files of this folder, in the order of the help."""
    modules = [importlib.import_module(f"{cli.__name__}.{info.name}") for info in pkgutil.iter_modules(cli.__path__)]
    having = sorted((module for module in modules if hasattr(module, "VERBS")), key=lambda module: module.PLACE)
    return [verb for module in having for verb in module.VERBS]


def make_parser() -> _Parser:
    """The parser of the whole command line; a parsed line knows its `Verb` as `called`."""
    common = _common()
    parser = _Parser(
        prog="nas",
        description="Finds networks that are accurate and fast on your device: measured, trained, ready to take away.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.set_defaults(called=None)
    places = parser.add_subparsers(metavar="VERB")

    def add(verb: Verb, places: Any) -> None:
        made = places.add_parser(verb.name, parents=[common], help=verb.text, description=verb.text)
        made.set_defaults(called=verb, parser=made)
        verb.arguments(made)

    for found in find_verbs():
        if isinstance(found, Verb):
            add(found, places)
            continue
        group = places.add_parser(found.name, help=found.text, description=found.text)
        inner = group.add_subparsers(metavar="VERB", required=True)
        for verb in found.verbs:
            add(verb, inner)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    with guarded() as (out, err), _stopped_as_by_ctrl_c():
        try:
            status, left = _answer(argv, err), None
        except SystemExit as end:
            status, left = int(end.code or 0), end
        with contextlib.suppress(OSError):
            out.flush()
        if status == 0 and out.failed is not None and not isinstance(out.failed, BrokenPipeError):
            print(f"nas: stdout cannot be written: {out.failed.strerror or out.failed}.", file=err)
            status, left = 1, None
    if left is not None:
        raise left
    return status


@contextlib.contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP end a verb as Ctrl-C does: what it was making is cleared away. A search hears them itself."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        heard = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) == signal.SIG_DFL]
        before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answer(argv: Sequence[str] | None, err: Stream) -> int:
    """Parse and carry out; the exit status. Words that are not understood, and --help, end by `SystemExit`."""
    try:
        parser = make_parser()
        args = parser.parse_all(argv)
        verb: Verb | None = args.called
        if args.version:
            import mixnas

            print(mixnas.__version__)
        elif verb is None:
            parser.print_help()
        if args.version or verb is None:
            return 0
    except OSError:  # of stdout: said at the end
        return 0
    except NasError as error:  # of an extension that is named in the environment
        print(f"nas: {error}", file=err)
        return error.exit_status
    except KeyboardInterrupt:
        print("nas: aborted", file=err)
        return 1
    level = logging.DEBUG if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=err, force=True)
    for noisy in ("torch", "jax", "matplotlib", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return _carry_out(verb, args)


def _carry_out(verb: Verb, args: argparse.Namespace) -> int:
    """Run a verb; whatever ends it is one sentence and a status."""
    try:
        name_extensions(args.imports)
        # What is no YAML is said before torch is imported; what was read is not read again.
        args.read = load_yaml(args.config) if os.path.isfile(getattr(args, "config", None) or "") else None
        return verb.run(args)
    except NasError as error:
        problem, status = as_given(args, str(error)), error.exit_status
    except KeyboardInterrupt:
        problem, status = "aborted", verb.aborted
    except BrokenPipeError:  # the reader of a pipe has seen enough
        return 0
    except SystemExit as end:
        problem, status = f"something that was run ended the program (sys.exit({end.code}))", 1
    except Exception as error:
        fault, run = machine_fault(error), getattr(args, "begun", None)
        advice = "" if run is None else f" Then go on: nas resume {run}."
        # Where no run has begun, there is none to go on with, whatever the verb.
        status = 1 if run is None and verb.aborted == StoppedEarly.exit_status else verb.aborted
        problem = f"{fault}.{advice}"
        if not fault and isinstance(error, OSError) and error.filename:  # a path that was given
            problem, status = f"{visible(str(error.filename))[:200]}: {error.strerror}.", 1
        elif not fault:  # nobody should come here: a fault of this program, or of one that was given to it
            what = shown(" ".join(str(error).split()))
            more = "" if args.verbose else " For its traceback: -v. If no file of yours is wrong, please report it."
            problem, status = f"{verb.name}: {type(error).__name__}: {what}.{more}", 1
    if args.verbose:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
    print(f"nas: {problem}", file=sys.stderr)
    return status
