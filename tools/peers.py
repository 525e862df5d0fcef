"""Builds the programs that benchmarks compare with: `peers.py VENV`, natively, into build/peers/bin.

llama-server, llama-batched-bench and llama-bench are built from the same sources of llama.cpp as the library in the
llm core: those in the source package of llama-cpp-python, in the version that constraints.txt pins. A ready-made wheel
of llama-server would be a generic build, half as fast, and so no fair comparison.

Nothing is downloaded or compiled twice. CMAKE_ARGS are passed on, for a GPU.
"""

import glob
import os
import shlex
import shutil
import sys
import tarfile

from bootstrap import ROOT, SLOW, pinned, stop, watch, works

FOLDER = os.path.join(ROOT, "build", "peers")
TARGETS = ["llama-server", "llama-batched-bench", "llama-bench"]
OFF = ["LLAMA_BUILD_UI", "LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES"]
ADVICE = {
    "cc": "apt install gcc (or dnf install gcc)",
    "c++": "apt install g++ (or dnf install gcc-c++)",
    "cmake": "apt install cmake (or dnf install cmake, or pip install cmake)",
}


def main():
    python = os.path.join(sys.argv[1], "bin", "python")
    os.makedirs(FOLDER, exist_ok=True)
    log = os.path.join(FOLDER, "build.log")
    open(log, "w").close()
    missing(python)
    source = sources(python, log)
    build(source, log)
    print("  " + "\n  ".join(os.path.join(FOLDER, "bin", target) for target in TARGETS))


def missing(python):
    """Stop with one line that names all missing tools."""
    lacks = [f"{tool}: {advice}" for tool, advice in ADVICE.items() if not shutil.which(tool)]
    if not (shutil.which("ninja") or shutil.which("make")):
        lacks.append("ninja or make: apt install ninja-build (or make)")
    if not works(python, "-m", "pip", "--version"):
        lacks.append(f"pip in {sys.argv[1]}: make install")
    if lacks:
        stop("to build the peers, these are missing: " + "; ".join(lacks))


def sources(python, log):
    """Download and unpack the source package; returns the folder of llama.cpp in it."""
    name = f"{SLOW.replace('-', '_')}-{pinned(SLOW)}"
    tree = os.path.join(FOLDER, name)
    source = os.path.join(tree, "vendor", "llama.cpp")
    if os.path.exists(os.path.join(source, "CMakeLists.txt")):
        return source
    archive = os.path.join(FOLDER, name + ".tar.gz")
    if not os.path.exists(archive):
        pip = [python, "-m", "pip", "download", "-v", "--no-input", "--disable-pip-version-check", "--no-deps"]
        pip += ["--no-binary", SLOW, "-d", FOLDER, f"{SLOW}=={pinned(SLOW)}"]
        watch(pip, log, f"downloading the sources of {SLOW} {pinned(SLOW)}")
    partial = tree + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    shutil.rmtree(tree, ignore_errors=True)
    os.rename(glob.glob(os.path.join(partial, "*"))[0], tree)
    os.rmdir(partial)
    if not os.path.exists(os.path.join(source, "CMakeLists.txt")):
        stop(f"{archive} holds no llama.cpp")
    return source


def build(source, log):
    into = os.path.join(FOLDER, "make")
    configure = ["cmake", "-S", source, "-B", into, "-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in OFF)]
    configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    watch(configure, log, "configuring llama.cpp")
    jobs = str(len(os.sched_getaffinity(0)))
    watch(["cmake", "--build", into, "--parallel", jobs, "--target", *TARGETS], log, "building llama-server")
    binaries = os.path.join(FOLDER, "bin")
    if not os.path.islink(binaries):
        os.symlink(os.path.join("make", "bin"), binaries)


if __name__ == "__main__":
    main()
