"""Runs deeds, each in a process of its own: run.py STAGE.json [NAME…]. Prints {name: "done" or the error} as JSON."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from tests.deeds import amounts, files, linux, processes, sockets  # noqa: F401
from tests.deeds.table import DEEDS, Stage

LIMIT_S = 10


def outcome(name: str, stage: Stage) -> str:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT_S)
        try:
            DEEDS[name](stage)
            words = "done"
        except OSError as err:
            words = errno.errorcode.get(err.errno or 0, str(err))
        except BaseException as err:
            words = f"{type(err).__name__}: {err}"
        os.write(writing, words.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        words = file.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return words or (f"killed by {signal.Signals(-status).name}" if status < 0 else "done")


def main(path: str, *names: str) -> None:
    with open(path) as file:
        stage = json.load(file)
    stage["inside"] = "AIOS_PID" in os.environ
    if stage["inside"]:
        os.chdir(os.path.expanduser("~"))  # where it has most rights
        stage["beside"] = os.path.expanduser("~/beside")
    found = {name: outcome(name, stage) for name in names or DEEDS}
    print(json.dumps(found | ({"workspace": os.getcwd()} if stage["inside"] else {})))


if __name__ == "__main__":
    main(*sys.argv[1:])
