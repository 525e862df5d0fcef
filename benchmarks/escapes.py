#!/usr/bin/env python
"""What an agent can do that it must not do, in each level of the sandbox, and what prevents it.

    $ python benchmarks/escapes.py
    deed                              none           flat           flat, network
    read_hidden                       done           EACCES         EACCES
    tcp_local                         done           EAFNOSUPPORT   done (accepted)
    …

The deeds are those of the tests (`tests/deeds`). Each is tried in a process of its own. A deed that fails without a
sandbox, too, proves nothing and is not counted. Exit code 1: a deed succeeded that is not accepted.

Results go to benchmarks/results/escapes.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402
from tests.deeds.accepted import ACCEPTED, WITH_NETWORK  # noqa: E402
from tests.deeds.stage import RUN, Stage  # noqa: E402

LEVELS = {
    f"{level}{', network' if net == 'all' else ''}": (level, net)
    for level in ("flat", "cage")
    for net in ("none", "all")
}


def inside(system: harness.Aiosd, stage: Stage, level: str, net: str) -> dict[str, str]:
    argv = [*harness.command("aios-run"), "--sandbox", level, "--net", net]
    argv += ["--processes", "5000", "--read", str(stage.path.parent)]  # or a budget would end it first
    with stage.for_inside() as inherited:
        done = subprocess.run(
            [*argv, str(RUN), str(stage.path)],
            env=system.env,
            cwd=stage.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
            pass_fds=[inherited],
        )
    found = json.loads(done.stdout)
    return Stage.survivor(found, Path(found.pop("workspace")))


def accepted(level: str, net: str) -> set[str]:
    return set(ACCEPTED[level]) | (set(WITH_NETWORK) if net == "all" else set())


def measure() -> dict[str, dict[str, str]]:
    """The outcome of each deed, by level."""
    with harness.Aiosd(harness.model_path("nano")) as system, tempfile.TemporaryDirectory() as folder:
        supervisor = next(one["ospid"] for one in system.processes() if one["name"] == "supervisor")
        with Stage(Path(folder), system.home / "data", supervisor) as stage:
            found = {"none": stage.outside()}
            found |= {name: inside(system, stage, *options) for name, options in LEVELS.items()}
    return found


def wrong(found: dict[str, dict[str, str]]) -> list[str]:
    """Deeds that succeeded and are not accepted."""
    possible = {name for name, outcome in found["none"].items() if outcome == "done"}
    return [
        f"{deed} in {name}"
        for name, options in LEVELS.items()
        for deed in sorted(possible - accepted(*options))
        if found[name][deed] == "done"
    ]


def show(found: dict[str, dict[str, str]]) -> None:
    print(f"{'deed':34}{''.join(f'{name:16}' for name in found)}")
    for deed, outcome in found["none"].items():
        cells = [outcome]
        for name, options in LEVELS.items():
            done = found[name][deed] == "done" and outcome == "done" and deed in accepted(*options)
            cells.append("done (accepted)" if done else found[name][deed])
        print(f"{deed:34}{''.join(f'{cell:16.16}' for cell in cells)}")
    possible = sum(outcome == "done" for outcome in found["none"].values())
    print(f"\n{possible} deeds are possible without a sandbox")
    for name in LEVELS:
        done = sum(found[name][deed] == "done" == outcome for deed, outcome in found["none"].items())
        print(f"{name}: {done} done")
    print(f"not accepted: {', '.join(wrong(found)) or 'none'}")


def rows(found: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    return [{"deed": deed, **{name: found[name][deed] for name in found}} for deed in found["none"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = measure()
    show(found)
    harness.write("escapes", rows(found), options.out)
    sys.exit(bool(wrong(found)))


if __name__ == "__main__":
    main()
