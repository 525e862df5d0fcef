"""Sets up the virtual environment that the Makefile works in: `bootstrap.py .venv base|dev|nano|bench`.

It must run with any `python3`, so it uses only the standard library and no syntax that an old Python cannot parse.
Building llama.cpp takes minutes; meanwhile one line on the terminal shows the step, its progress and the time so far.
Without a terminal a line is printed every half minute. pip's whole output is in `.venv/setup.log`; its end is shown
when something fails.
"""

import configparser
import fcntl
import glob
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONSTRAINTS = os.path.join(ROOT, "constraints.txt")
OLDEST = (3, 11)
SLOW = "llama-cpp-python"  # has no binary packages: pip compiles it
HAVE = "import importlib.metadata as m, sys; sys.exit(m.version(sys.argv[1]) != sys.argv[2])"

#: Leave out llama.cpp's part for images and sound (a third of the compiling), and the code that its own programs share.
TRIMMED = os.path.join(ROOT, "tools", "llama_cpp.cmake")
OURS = ["-DLLAVA_BUILD=OFF", shlex.quote("-DCMAKE_PROJECT_llama.cpp_INCLUDE=" + TRIMMED)]
EXTRAS = {"base": "", "dev": "[dev]", "nano": "[nano]", "bench": "[bench]"}

#: Patterns of lines of pip's output, and the phase that each shows. The first match counts; {0} is its first group.
PHASES = [
    (re.compile(r"^\s*\[(\d+)/(\d+)\] "), "compiling llama.cpp, step {0} of {1}"),  # ninja
    (re.compile(r"^\s*\[ *(\d+)%\] "), "compiling llama.cpp, {0} %"),  # make
    (re.compile(r"^\s*Building wheel for (\S+)"), "building {0}"),
    (re.compile(r"^\s*Downloading (\S+)"), "downloading {0}"),
    (re.compile(r"^\s*Collecting (\S+)"), "looking for {0}"),
    (re.compile(r"^\s*Installing collected packages"), "installing"),
]


def main():
    venv, stage = sys.argv[1], sys.argv[2]
    if sys.version_info < OLDEST:
        have = "{}.{}".format(*sys.version_info[:2])
        stop(f"Python {have} is too old, 3.11 or later is needed: make PYTHON=/path/to/python3.11 …")
    os.makedirs(venv, exist_ok=True)
    with open(os.path.join(venv, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `make -j` may start two stages at once
        python = os.path.join(venv, "bin", "python")
        log = os.path.join(venv, "setup.log")
        open(log, "w").close()
        make_venv(venv, python, log)
        install_llama_cpp(venv, python, stage, log)
        install(python, stage, log)
        for stamp in {"base", stage}:
            with open(os.path.join(venv, "." + stamp), "w"):
                pass


def make_venv(venv, python, log):
    if works(python, "-c", "import sys, pip; sys.exit(sys.version_info < (3, 11))"):
        return
    if not works(sys.executable, "-c", "import ensurepip, venv"):
        stop("this Python has no venv module: install it (Debian, Ubuntu: apt install python3-venv)")
    watch([sys.executable, "-m", "venv", "--clear", venv], log, f"creating {venv}")


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────────


def install_llama_cpp(venv, python, stage, log):
    """Install llama-cpp-python, with the parts of llama.cpp that aiosd uses, from a wheel built once for this machine.

    The wheel lies in the user's cache, under a name made from all that it depends on. So nothing is compiled again for
    another checkout, another virtual environment, or after `make distclean`. Options that a person sets by CMAKE_ARGS
    (such as a GPU) are stored in the virtual environment, and hold until CMAKE_ARGS is set differently.
    """
    remembered = os.path.join(venv, ".cmake_args")
    asked = os.environ.get("CMAKE_ARGS", read(remembered)).strip()
    folder = os.path.join(cache(), "aiosd", "wheels", wheel_key(asked))
    stamp = os.path.join(venv, ".llama_cpp")
    if read(stamp) != folder or not works(python, "-c", HAVE, SLOW, pinned(SLOW)):
        if not wheels(folder):
            ahead = start_packages(python, stage, os.path.join(venv, "packages.log"))
            try:
                build_llama_cpp(python, folder, asked, log)
            except SystemExit:
                ahead.terminate()
                raise
            finally:
                ahead.wait()
        pip = [python, "-m", "pip", "install", "-v", "--no-input", "--disable-pip-version-check"]
        watch([*pip, "--no-deps", "--force-reinstall", *wheels(folder)], log, "installing " + SLOW)
    for path, text in ((remembered, asked), (stamp, folder)):
        with open(path, "w") as file:
            file.write(text)


def build_llama_cpp(python, folder, asked, log):
    check_compiler(python)
    partial = f"{folder}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pip = [python, "-m", "pip", "wheel", "-v", "--no-input", "--disable-pip-version-check", "--no-deps", "-w", partial]
    if asked:
        pip.append("--no-cache-dir")  # pip's cache does not distinguish options
    environ = dict(os.environ, CMAKE_ARGS=" ".join([*OURS, asked]))
    watch([*pip, f"{SLOW}=={pinned(SLOW)}"], log, "building " + SLOW, environ=environ)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def wheel_key(asked):
    """A name from version, options and machine: llama.cpp is compiled for this model of processor."""
    said = [line for line in read("/proc/cpuinfo").splitlines() if line.startswith(("flags", "Features", "model name"))]
    parts = [pinned(SLOW), asked, read(TRIMMED), platform.machine(), *sorted(set(said))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{pinned(SLOW)}-{digest[:12]}"


def wheels(folder):
    return glob.glob(os.path.join(glob.escape(folder), "*.whl"))


def cache():
    return os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")


def check_compiler(python):
    """Stop if llama.cpp has to be built and there is no compiler, before minutes of downloading."""
    if shutil.which(os.environ.get("CXX", "").split(" ")[0] or "c++") and shutil.which("cc"):
        return
    pip = [python, "-m", "pip"]
    built_before = f"-{pinned(SLOW)}-" in output(*pip, "cache", "list", SLOW.replace("-", "_"))
    binary = ["install", "--dry-run", "--no-deps", "--only-binary", ":all:", f"{SLOW}=={pinned(SLOW)}"]
    if not built_before and not works(*pip, *binary):
        stop("llama.cpp has to be built, but there is no C++ compiler: apt install g++ (or dnf install gcc-c++)")


def start_packages(python, stage, log):
    """Install all other packages of a stage while llama.cpp is compiled: most of that time is waiting for the network.
    `install` then finds them installed. A failure here is ignored, because `install` reports missing packages."""
    command = [python, "-m", "pip", "install", "-v", "--no-input", "--disable-pip-version-check", "-c", CONSTRAINTS]
    with open(log, "wb") as out:
        return subprocess.Popen(
            [*command, *requirements(stage)], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )


def requirements(stage):
    """The requirements of this stage in setup.cfg, without llama-cpp-python."""
    config = configparser.ConfigParser()
    config.read(os.path.join(ROOT, "setup.cfg"))
    lines = config["options"]["install_requires"].split("\n")
    if EXTRAS[stage]:
        lines += config["options.extras_require"][stage].split("\n")
    return [line for line in lines if line and not line.startswith(SLOW)]


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────────


def install(python, stage, log):
    # The old form of an editable install: a path in a .pth file. The new form is an import hook, which costs every
    # command milliseconds at its start.
    target = ROOT + EXTRAS[stage]
    command = [python, "-m", "pip", "install", "-v", "--no-input", "--disable-pip-version-check"]
    command += ["-c", CONSTRAINTS, "-C", "editable_mode=compat", "-e", target]
    watch(command, log, "installing aiosd" + EXTRAS[stage])


def watch(command, log, what, progress=lambda: "", environ=None):
    """Run `command` with its output in `log`. Meanwhile show its phase, and the text that `progress` returns."""
    began = time.monotonic()
    with open(log, "ab") as out, open(log, "rb") as read:
        read.seek(0, os.SEEK_END)
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, cwd=ROOT, env=environ, **streams)
        line = TerminalLine(what, began) if sys.stderr.isatty() else PlainLines(what, began)
        phase = ""
        try:
            while child.poll() is None:
                phase = phase_in(read.read(), phase)
                line.show(" ".join(filter(None, (phase, progress()))))
                time.sleep(0.2)
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            line.end("interrupted")
            sys.exit(130)
    if child.returncode:
        line.end("failed")
        with open(log, errors="replace") as read:
            sys.stderr.write("".join(["  | " + text for text in read.readlines()[-25:]]))
        stop(f"{what} failed; the whole log is {log}")
    line.end("done")


def phase_in(text, phase):
    """The last phase in `text`, new output of pip; `phase` if there is none."""
    for line in reversed(text.decode(errors="replace").splitlines()):
        for pattern, words in PHASES:
            found = pattern.match(line)
            if found:
                return words.format(*found.groups())
    return phase


class TerminalLine:
    """One line of a terminal, which is written again and again."""

    def __init__(self, what, began):
        self.what, self.began, self.turns = what, began, 0

    def show(self, phase):
        self.turns += 1
        wheel = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[self.turns % 10]
        text = f"{wheel} {self.what} {elapsed(self.began)}  {phase}"
        sys.stderr.write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
        sys.stderr.flush()

    def end(self, word):
        sys.stderr.write(f"\r\x1b[K  {self.what}: {word}, {elapsed(self.began)}\n")


class PlainLines:
    """A new line every half minute, for logs."""

    PERIOD_S = 30.0

    def __init__(self, what, began):
        self.what, self.began, self.last = what, began, time.monotonic()
        sys.stderr.write(f"  {what} …\n")

    def show(self, phase):
        if time.monotonic() - self.last >= self.PERIOD_S:
            self.last = time.monotonic()
            sys.stderr.write(f"  {self.what}, {elapsed(self.began)}: {phase}\n")
            sys.stderr.flush()

    def end(self, word):
        sys.stderr.write(f"  {self.what}: {word}, {elapsed(self.began)}\n")


def elapsed(began):
    return "{}:{:02}".format(*divmod(int(time.monotonic() - began), 60))


def pinned(package):
    with open(CONSTRAINTS) as file:
        return re.search(rf"^{package}==(\S+)", file.read(), re.M).group(1)


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def works(*command):
    try:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def output(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()


def stop(message):
    sys.stderr.write(f"make: {message}\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
