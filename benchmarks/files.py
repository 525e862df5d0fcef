#!/usr/bin/env python
"""An agent uploads a large file to the store and downloads it: how fast, compared with `cp` on the same disk, and how
much memory each process needs for it.

    $ python benchmarks/files.py --gigabytes 1
                             s       MB/s   × cp
    cp, and sync           2.1        512
    upload                 9.8        110   4.7
    download               4.2        256   2.0

    MB of memory        before      peak    more    bar     CPU ms a MB
    agent                   28        34       6     64             3.1   kept
    …

The file is random bytes, so that no two pieces are equal. Memory is the resident set: its peak (`VmHWM`) is reset
before. "more" is the difference. Results go to benchmarks/results/files.json. Exit status 1: the bar is missed, or a
byte is wrong.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import AGENT, Aiosd, model_path, race, verdict, write  # noqa: E402

BAR_MB = 64
MB = 1 << 20
OURS = ("kernel", "store", "supervisor")

SCRIPT = (
    AGENT
    + """
import os, time
def run(order):
    if order["what"] == "pid":
        return {"pid": os.getpid()}
    began = time.perf_counter()
    if order["what"] == "upload":
        aios.sto.upload("large", order["path"])
    else:
        aios.sto.download("large", order["path"])
    return {"took": time.perf_counter() - began}
serve(run)
"""
)


def memory_mb(pid: int, what: str) -> float:
    """`what`: VmRSS or VmHWM."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        for _ in range(size // MB):
            file.write(os.urandom(MB))
        os.fsync(file.fileno())


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def copy(source: Path, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    took = time.perf_counter() - began
    target.unlink()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = int(options.gigabytes * 1024) * MB
    with tempfile.TemporaryDirectory(prefix="aios-files-") as scratch:
        large, back = Path(scratch) / "large", Path(scratch) / "back"
        make(large, size)
        with Aiosd(model_path("nano"), "--threads", "1") as system:
            (agent,) = system.start(1, SCRIPT, options=("--name", "copier"))
            pids = {p["name"]: int(p["ospid"]) for p in system.processes() if p["name"] in OURS}
            pids["agent"] = int(race([agent], [{"what": "pid"}])[0]["pid"])
            before = {name: memory_mb(pid, "VmRSS") for name, pid in pids.items()}
            for pid in pids.values():
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
            cpu = {name: cpu_s(pid) for name, pid in pids.items()}
            seconds = {"cp, and sync": copy(large, Path(scratch) / "copy")}
            for what, path in (("upload", large), ("download", back)):
                seconds[what] = float(race([agent], [{"what": what, "path": str(path)}])[0]["took"])
            cpu = {name: cpu_s(pid) - cpu[name] for name, pid in pids.items()}
            peak = {name: memory_mb(pid, "VmHWM") for name, pid in pids.items()}
        whole = digest(large) == digest(back)
    print(f"{'':20}{'s':>8}{'MB/s':>10}{'× cp':>8}")
    for what, took in seconds.items():
        print(f"{what:20}{took:8.1f}{size / MB / took:10.0f}{took / seconds['cp, and sync']:8.1f}")
    print(f"\n{'MB of memory':20}{'before':>8}{'peak':>10}{'more':>8}{'bar':>6}{'CPU ms a MB':>16}")
    missed = [] if whole else ["bytes"]
    for name in pids:
        more = peak[name] - before[name]
        word = verdict(more, BAR_MB)
        row = f"{name:20}{before[name]:8.0f}{peak[name]:10.0f}{more:8.0f}{BAR_MB:6}"
        print(f"{row}{cpu[name] * 1e3 * MB / size:16.1f}  {word}")
        missed += [name] if word == "MISSED" else []
    print("\nall bytes are as they were" if whole else "\nWRONG: not all bytes are as they were")
    rows = [{"what": what, "s": took, "mb_per_s": size / MB / took} for what, took in seconds.items()]
    rows += [{"process": name, "before_mb": before[name], "peak_mb": peak[name], "cpu_s": cpu[name]} for name in pids]
    write("files", rows, options.out, missed=missed, bytes=size)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
