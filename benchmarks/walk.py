"""The commands of the documentation as a newcomer would run them, one after the other in a fresh clone, timed.

    python benchmarks/walk.py [--pages README.md,docs/tutorial.md] [--into DIR] [--without PATTERN] [--output FILE]

Clones this checkout's HEAD into DIR (a temporary folder if not given). Where DIR is a clone already, with its own
environment in DIR/.venv, it is used as it stands; else the first `make` sets it up. The YAML and Python files that a
page shows are written as it says, from the comment in their first line; Python without one is run at the end.
`source` and `pip install` become the environment's place at the front of PATH. Prints one JSON: each command with its
seconds, its status and, where it failed, the end of what it said. Ends with 1 where any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

from mixnas.search.run.origin import versions  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402

PAGES = "docs/tutorial.md"
ALLOWED = {"--where": (0, 3)}
"""Statuses of commands with an option that may find nothing."""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page."""
    for block in text.split("```")[1::2]:
        language, _, content = block.partition("\n")
        yield language, content


def commands(content: str) -> list[list[str]]:
    """The command lines of a block, as words."""
    return [words for line in content.splitlines() if (words := shlex.split(line, comments=True))]


class Walk:
    """Runs commands where the ones before have led.

    Args:
        clone: The fresh clone.
        skipped: What is not run, as a pattern of the whole line.
    """

    def __init__(self, clone: Path, skipped: str) -> None:
        self.clone, self.folder = clone, clone
        self._skipped = re.compile(skipped) if skipped else None
        path = f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        self._environment = {**os.environ, "PATH": path}
        self.steps: list[dict[str, Any]] = []

    def run(self, words: list[str], shown: str = "") -> None:
        """One command."""
        line = shown or shlex.join(words)
        if words[0] == "cd":
            self.folder = self.folder / words[1]
        if words[0] in ("cd", "source") or words[:2] == ["pip", "install"]:
            return
        if self._skipped is not None and self._skipped.search(line):
            self.steps.append({"command": line, "skipped": True})
            return
        begun = time.perf_counter()
        done = subprocess.run(words, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        seconds = round(time.perf_counter() - begun, 2)
        allowed = next((statuses for option, statuses in ALLOWED.items() if option in words), (0,))
        step: dict[str, Any] = {"command": line, "seconds": seconds, "status": done.returncode}
        if done.returncode not in allowed:
            step["failed"] = (done.stdout + done.stderr)[-2000:]
        self.steps.append(step)
        print(f"{seconds:8.2f} s  {done.returncode}  {line}", file=sys.stderr, flush=True)

    def page(self, page: Path) -> None:
        """All commands of a page; what it shows of files is written before."""
        self.folder, found = self.clone, list(blocks(page.read_text(encoding="utf-8")))
        programs = []
        for language, content in found:
            name = re.match(r"# (\S+\.(?:py|yaml))\n", content)
            if language in ("python", "yaml") and name:
                (self.folder / name[1]).write_text(content, encoding="utf-8")
            elif language == "python":
                programs.append(content)
        for language, content in found:
            if not language:
                for words in commands(content):
                    self.run(words)
        for program in programs:
            self.run(["python", "-c", program], f"{page.name}: its Python")


def main() -> int:
    """Walk and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", default=PAGES)
    parser.add_argument("--into", metavar="DIR")
    parser.add_argument("--without", default="", metavar="PATTERN", help="commands that are not run, say 'make test'")
    parser.add_argument("--output")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(args.into or Path(folder) / "clone").resolve()
        if not (clone / ".git").exists():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True)
        found: dict[str, Any] = {"commit": head.stdout.strip(), "versions": versions(), "pages": {}}
        for page in args.pages.split(","):
            walk = Walk(clone, args.without)
            if not (clone / ".venv").exists():
                walk.run(["make", "install"])
            walk.page(clone / page)
            total = sum(step.get("seconds", 0.0) for step in walk.steps)
            found["pages"][page] = {"seconds": round(total, 1), "steps": walk.steps}
            if args.output:
                write_json(args.output, found)  # whatever becomes of the pages behind
    print(json.dumps(found, indent=1))
    if args.output:
        write_json(args.output, found)
    return int(any("failed" in step for page in found["pages"].values() for step in page["steps"]))


if __name__ == "__main__":
    sys.exit(main())
