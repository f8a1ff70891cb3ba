"""Nodes of a trial on one machine without a start from nothing each: ``python -m storenode.nursery``.

Law: one process with one thread loads the program once, then forks a child for each node that is asked for. A child is what
``python ARGUMENT…`` is, for a module (``-m storenode``) or a script that uses it; in a process and a session of its own with its output
in files, and dies with this process. Nothing is shared that is written to: no open file, no socket, no key is here before a fork.

Asked over standard input, a JSON document a line; each is answered by one line on standard output:
{"start": [ARGUMENT, …], "folder": PATH, "out": PATH, "err": PATH, "environ": {NAME: VALUE, …}} -> the child's process id,
{"poll": PID} -> its exit code, negative for a signal, or null while it runs. Ends when standard input does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import sys
import time

# What a node uses, loaded before it is asked for.
import storenode.app
import storenode.cli
import storenode.running  # noqa: F401


def main() -> int:
    """Serve until the asker is gone; in a child, run its node. The exit code."""
    ended: dict[int, int] = {}
    gc.collect()
    gc.freeze()  # else the first collection in every child copies all of it
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            answer: int | None = _poll(asked["poll"], ended)
        else:
            answer = _fork(asked["out"], asked["err"])
            if answer == 0:
                os.chdir(asked["folder"])
                return _run(asked["start"], asked["environ"])
            ended.pop(answer, None)  # a number that was another child's before
        print(json.dumps(answer), flush=True)
    return 0


def _poll(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done == 0:
            return None
        ended[pid] = os.waitstatus_to_exitcode(status)
    return ended[pid]


def _fork(out: str, err: str) -> int:
    """0 in the child, whose input is empty, whose output goes to these files and who hears no Ctrl-C that is meant for others."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if sys.platform == "linux":
            pr_set_pdeathsig = 1  # linux/prctl.h
            ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)  # it went before we asked
        adding = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        for number, (path, flags) in enumerate(((os.devnull, os.O_RDONLY), (out, adding), (err, adding))):
            opened = os.open(path, flags | os.O_CLOEXEC, 0o666)
            os.dup2(opened, number)
            os.close(opened)
    return pid


def _run(arguments: list[str], environ: dict[str, str]) -> int:
    os.environ.clear()
    os.environ.update(environ)
    time.tzset()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    return 0  # unless they said otherwise by SystemExit


if __name__ == "__main__":
    sys.exit(main())
