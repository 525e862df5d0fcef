"""A guest: an agent of a group with fewer rights.

    $ aios-run -g guests guest.py ../keys.txt

Its model answers with the help of a tool. Then it calls a tool that a rule of aiosd.toml denies, and opens a file that
its sandbox hides. (All agents run in a sandbox by default.)
"""

import sys
from pathlib import Path

import libaios as aios

QUESTION = "What is 18 * 24?"


def main() -> None:
    done = aios.llm.run([{"role": "user", "content": QUESTION}], tools=["calc"])
    print(f"{QUESTION} {done.text}  ({done.calls} call of calc)", flush=True)
    try:
        aios.tool.call("shell", command="rm -rf ~")
    except PermissionError as err:
        print(err.strerror, flush=True)
    try:
        print(Path(sys.argv[1]).read_text())
    except OSError as err:
        print(f"{Path(sys.argv[1]).name}: {err.strerror}")


if __name__ == "__main__":
    main()
