"""Ray on this machine, in a session of processes of its own that ends with whoever started it. A script; see `main`.

Two processes: one watches, and knows nothing of Ray; its child starts Ray. The first ends all of the session, and
removes its folder, when its standard input ends (its caller has, in whatever way), its child does, or a part without
which Ray is no more. Ray itself would leave agents behind for a minute after a kill, and the folder for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_LONGEST = 36  # characters of a folder's name: those of Ray's sockets in it may have 107
_LOOK_SECONDS = 0.2
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux
_WEIGH_SECONDS = 2.0  # between two looks at how much its files take
_MIB = 1 << 20
END_SECONDS = 10.0


def processes_of(session: int) -> list[int]:
    """The processes of a session but for this one; zombies have ended."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").exists() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                state, _, _, theirs = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(theirs) == session and state != "Z" and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
    return found


def end_session(session: int) -> None:
    """Kill every process of a session, those too that are born meanwhile."""
    until = time.monotonic() + END_SECONDS
    while (left := processes_of(session)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _vital() -> dict[int, str]:
    """The processes of this session without which Ray is no more, and their names, once both are there."""
    found = {}
    for pid in processes_of(os.getsid(0)):
        with contextlib.suppress(OSError):
            program = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0])
            if program.endswith(("/gcs_server", "/raylet")):
                found[pid] = Path(program).name
    return found if len(found) == 2 else {}


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _mib_in(*folders: str) -> int:
    """What the files in folders take on the disk, in MiB."""
    blocks = 0
    for folder in folders:
        for where, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):
                    blocks += os.lstat(os.path.join(where, name)).st_blocks
    return blocks * 512 // _MIB


def _adopt() -> None:
    """Have orphans of this session become this process's children: in a container nobody else may bury them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def _bury() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _folder(wanted: str | None) -> str:
    """A new folder for Ray's files, whose name is short."""
    under = wanted or tempfile.gettempdir()
    if wanted is None and len(under) > _LONGEST - len("/ray-12345678"):
        under = "/tmp"
    return tempfile.mkdtemp(prefix="ray-", dir=under)


def _watch(options: dict[str, Any]) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the caller
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    _adopt()
    folder, disk_mb = _folder(options.pop("under")), options.pop("disk_mb")
    spill = tempfile.mkdtemp(prefix=".ray-spill-", dir=options.pop("spill_under") or folder)
    print(json.dumps({"folder": folder, "spill": spill}), flush=True)
    why = ""
    try:
        options |= {"_temp_dir": f"{folder}/r", "object_spilling_directory": spill}  # Ray opens its folder to all
        command = [sys.executable, "-P", __file__, "start", json.dumps(options)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=folder)
        vital: dict[int, str] = {}
        weighed = time.monotonic()
        while not why:
            vital = vital or _vital()
            gone = [name for pid, name in vital.items() if _ended(pid)]
            if gone or child.poll() is not None:
                why = f"{gone[0] if gone else 'the process that started it'} ended"
            elif time.monotonic() - weighed > _WEIGH_SECONDS:
                taken, weighed = _mib_in(folder, spill), time.monotonic()
                if taken > disk_mb:
                    why = f"its files take {taken} MiB of the disk, and may take {disk_mb}"
            ready, _, _ = select.select([sys.stdin], [], [], 0 if why else _LOOK_SECONDS)
            if ready and not os.read(sys.stdin.fileno(), 100):
                return
        with contextlib.suppress(OSError):  # nobody may listen
            print(json.dumps({"failure": why}), flush=True)
    finally:
        end_session(os.getsid(0))
        _bury()
        shutil.rmtree(spill, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def _start(options: dict[str, Any]) -> None:
    import ray

    try:
        context: Any = ray.init("local", **options, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        print(json.dumps({"failure": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps({"address": context.address_info["gcs_address"]}), flush=True)
    sys.stdin.read()


def main() -> None:
    """`_head.py watch OPTIONS`, options of `ray.init` as JSON, and besides

    `under`: where its folder is made; `spill_under`: where a folder for what it spills is, else in the first;
    `disk_mb`: how much both may hold, in MiB.

    It says, a line of JSON each, `folder` and `spill`, then `address` or `failure`, and `failure` later where it ended
    by itself.
    """
    what, options = sys.argv[1], json.loads(sys.argv[2])
    (_watch if what == "watch" else _start)(options)


if __name__ == "__main__":
    main()
