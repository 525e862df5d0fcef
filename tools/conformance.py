"""Other projects' tests, run against the gateway: `conformance.py VENV [MODEL]`.

    llama.cpp    the tests of its own server, from the source package of llama-cpp-python, against an external server
    openai       tests/api_resources of the openai package, from its source package, in its strict mode
    cerebrum     the tests of AIOS's SDK for llm and memory, from its repository (its package has none); the variable
                 CEREBRUM_SOURCE may name another repository with the same commit

The tests' sources and their environment lie in build/conformance. A system is started for the run. The tests are
changed in two points only: their requests have a token of its gateway, and requests to AIOS's usual address go to the
gateway (`conformance_auth`). Each test that fails must have a reason in `REASONS`, which docs/conformance.md explains;
the exit code is 1 when one has none.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter

import peers
from bootstrap import ROOT, pinned, stop, watch, works

FOLDER = os.path.join(ROOT, "build", "conformance")
#: What the tests import, besides the openai package.
PACKAGES = [
    *("aiohttp", "filelock", "inline-snapshot", "numpy", "prometheus-client", "pytest", "pytest-asyncio", "requests"),
    *("rich", "respx", "websockets", "wget", "platformdirs", "python-dotenv", "pyyaml"),
]
#: The tests of llama.cpp about OpenAI's API. The others start llama-server with options of its own (router, LoRA, slots
#: on disk, speculation, sleep, proxy, MCP), or test another API (Anthropic, GCP, infill, vision).
LLAMA = [
    *("basic", "chat_completion", "compat_oai_responses", "completion", "ctx_shift", "embedding", "ignore_eos"),
    *("metrics", "security", "template", "tokenize", "tool_call"),
]
CEREBRUM = "https://github.com/agiresearch/Cerebrum", "534c6c4"
OPENAI = ["chat", "responses", "test_completions.py", "test_embeddings.py", "test_models.py", "test_responses.py"]

#: Why a test cannot pass: (suite, pattern in its name or message, reason). The first that matches counts.
REASONS = [
    ("llama.cpp", r"there is nothing at|assert 40[45] == |\(40[45] == |: \(404|KeyError: ('content'|0)$",
     "a path of llama-server alone (/completion, /props, /slots, /apply-template, /infill, …)"),
    ("llama.cpp", r"__verbose|timings|telemetry|return_progress|prompt_progress|token_count|test_metrics",
     "a field or metric of llama-server alone"),
    ("llama.cpp", r"Template file .* does not exist", "the test fetches a file from a hub"),
    ("llama.cpp", r"Expected non empty content delta|assert '' is None",
     "the first chunk has content \"\", as OpenAI's has; llama-server's has null"),
    ("llama.cpp", r"test_security", "keys and origins are set as llama-server's options; errors are named as OpenAI's"),
    ("llama.cpp", r"test_embedding",
     "token ids, objects and empty texts in embeddings are refused; wording and figures are the model's"),
    ("llama.cpp", r"context_size_ex|continue_final|multiple_add|messages7|no_ui|aliases|tinyllama-2|ctx_shift",
     "the test sets an option of llama-server at its start, or wants an answer refused that we give"),
    ("llama.cpp", r"'aiosd-", "the fingerprint is aiosd's"),
    ("llama.cpp", r"Expected|assert \d+ == |assert (False|None)|Unexpected output",
     "the test wants the words or tokens of a model that it fetches from a hub"),
    ("openai", r"404 - there is nothing at|405 - ",
     "a path that is not served (stored chats, compaction, deletion of models)"),
    ("openai", r"404 - '|404 - there is no model|not known \(any more\)",
     "an id of the test's that names nothing here"),
    ("openai", r"400 - (stream: what is over|limit: )", "what is over is not sent again in parts; a list of 0 items"),
    ("openai", r"400 - input: it is missing", "a response to nothing: refused"),
    ("openai", r"400 - (suffix|background|audio|dimensions|conversation|prompt|moderation|text\.verbosity): ",
     "all parameters at once, among them one that cannot be honoured: 400 with its name"),
    ("openai", r"test_embeddings.*APIResponseValidationError",
     "the client asks for base64, and checks that it got floats"),
    ("cerebrum", r"has no attribute 'create_basic_memory'", "the test calls a method that its class does not have"),
]  # fmt: skip


def main():
    model = sys.argv[2] if len(sys.argv) > 2 else "nano"
    os.makedirs(FOLDER, exist_ok=True)
    log = os.path.join(FOLDER, "log")
    open(log, "w").close()
    python = environment(sys.argv[1], log)
    llama = os.path.join(peers.sources(os.path.join(sys.argv[1], "bin", "python"), log), "tools", "server", "tests")
    openai = source_of("openai", python, log)
    cerebrum = commit_of(*CEREBRUM, log)
    with Gateway(sys.argv[1], model) as gateway:
        files = [f"unit/test_{name}.py" for name in LLAMA]
        found = {"llama.cpp": run("llama.cpp", python, llama, files, gateway, log)}
        files = [f"tests/api_resources/{name}" for name in OPENAI]
        found["openai"] = run("openai", python, openai, files, gateway, log)
        found["cerebrum"] = run("cerebrum", python, cerebrum, ["tests/apis"], gateway, log)
    sys.exit(report(found, model))


def environment(venv, log):
    """Make an environment with the packages; returns its Python."""
    folder = os.path.join(FOLDER, "venv")
    python = os.path.join(folder, "bin", "python")
    if not works(python, "-c", "import openai, wget, pytest_asyncio, respx, aiohttp, inline_snapshot, dotenv"):
        watch([os.path.join(venv, "bin", "python"), "-m", "venv", folder], log, "making build/conformance/venv")
        wanted = [f"openai[aiohttp]=={pinned('openai')}", *PACKAGES]
        watch([python, "-m", "pip", "install", "-q", *wanted], log, "installing what the tests import")
    return python


def source_of(package, python, log):
    """The folder of the package's unpacked sources, in the version that constraints.txt pins."""
    name = f"{package}-{pinned(package)}"
    folder = os.path.join(FOLDER, name)
    if not os.path.exists(os.path.join(folder, "tests")):
        # Only the package itself as sources; its build requirements may be wheels.
        pip = [python, "-m", "pip", "download", "--no-deps", "--no-binary", package, "-d", FOLDER]
        archive = f"{folder}.tar.gz"
        if not os.path.exists(archive):
            watch([*pip, name.replace("-", "==")], log, f"downloading the sources of {name}")
        with tarfile.open(archive) as tar:
            tar.extractall(FOLDER, filter="data")
    if not os.path.exists(os.path.join(folder, "tests", "api_resources")):
        stop(f"{folder} has no tests")
    return folder


def commit_of(place, commit, log):
    """A folder with the repository at that commit."""
    name = place.rsplit("/", 1)[1]
    folder = os.path.join(FOLDER, f"{name}-{commit}")
    place = os.environ.get(f"{name.upper()}_SOURCE", place)
    if not works("git", "-C", folder, "rev-parse", "--verify", f"{commit}^{{commit}}"):
        watch(["git", "clone", "-q", "--no-checkout", place, folder], log, f"fetching {name}")
    watch(["git", "-C", folder, "checkout", "-q", "-f", commit], log, f"{name} {commit}")
    return folder


class Gateway:
    """A system with a gateway, and a token for it."""

    def __init__(self, venv, model):
        self._aiosd = os.path.join(ROOT, venv, "bin", "aiosd")
        self._home = tempfile.TemporaryDirectory(prefix="aios-", dir="/tmp")
        self._env = os.environ | {"AIOS_HOME": self._home.name}
        self._model = model

    def _do(self, *words):
        done = subprocess.run([self._aiosd, *words], env=self._env, capture_output=True, text=True)
        if done.returncode:
            stop(f"aiosd {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def __enter__(self):
        self._do("-d", "--model", self._model)
        try:
            lines = self._do("token", "conformance", "--export").splitlines()
        except BaseException:  # whatever happens, the system must not be left running
            self.__exit__()
            raise
        found = dict(line.removeprefix("export ").split("=", 1) for line in lines)
        self.url, self.token = found["OPENAI_BASE_URL"], found["OPENAI_API_KEY"]
        self.kernel = found["CEREBRUM_KERNEL_URL"]
        return self

    def __exit__(self, *exc):
        self._do("stop")
        self._home.cleanup()


def run(suite, python, folder, files, gateway, log):
    """Run the tests; returns (name, outcome, message) of each."""
    results = os.path.join(FOLDER, f"{suite}.xml")
    env = os.environ | {
        "CONFORMANCE_TOKEN": gateway.token,
        "TEST_API_BASE_URL": gateway.url,
        "CEREBRUM_KERNEL_URL": gateway.kernel,
        "PORT": re.search(r":(\d+)", gateway.url)[1],
        "DEBUG_EXTERNAL": "1",
        "PYTHONPATH": os.path.join(ROOT, "tools"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    options = ["-p", "conformance_auth", "-p", "no:cacheprovider", "-q", "--tb=short", "-o", "addopts="]
    if suite == "openai":
        options += ["-k", "strict"]  # "loose" tests check less, "aiohttp" tests use another client
    if suite == "cerebrum":
        options += ["-c", os.devnull, "--rootdir", folder]  # or pytest would find aiosd's settings in a folder above
    with open(log, "ab") as out:
        command = [python, "-m", "pytest", *options, f"--junitxml={results}", *files]
        code = subprocess.run(command, cwd=folder, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL).returncode
    if code not in (0, 1):
        stop(f"the tests of {suite} did not run; see {log}")
    return [_outcome(case) for case in ET.parse(results).iter("testcase")]


def _outcome(case):
    name = f"{case.get('classname')}::{case.get('name')}"
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            outcome = "skipped" if kind == "skipped" else "failed"
            return name, outcome, found.get("message") or ""
    return name, "passed", ""


def reason(suite, name, message):
    """Why this test cannot pass; None: no reason is known."""
    text = f"{name} {message}"
    return next((why for of, pattern, why in REASONS if of == suite and re.search(pattern, text)), None)


def report(found, model):
    """Print the tables; returns the exit code."""
    unexplained, out = [], {"model": model}
    for suite, outcomes in found.items():
        counts = Counter(outcome for _, outcome, _ in outcomes)
        why = Counter()
        for name, outcome, message in outcomes:
            if outcome == "failed":
                known = reason(suite, name, message)
                why[known or "unexplained"] += 1
                if known is None:
                    unexplained.append(f"{suite}: {name}: {message.strip().splitlines()[0][:200]}")
        out[suite] = {"counts": dict(counts), "why": dict(why)}
        line = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        print(f"{suite}: {line}")
        for words, count in why.most_common():
            print(f"  {count:4}  {words}")
    with open(os.path.join(FOLDER, "conformance.json"), "w") as file:
        json.dump(out, file, indent=2)
    for line in unexplained:
        print(f"unexplained: {line}", file=sys.stderr)
    return 1 if unexplained else 0


if __name__ == "__main__":
    main()
