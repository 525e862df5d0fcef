"""Installs real MCP servers for the tests: `mcpservers.py [NAME…]`, each into an environment of its own.

Three come from PyPI, three from npm. They are installed into build/mcp-servers/NAME, unless they are there already. The
names of servers that cannot be installed are printed; tests with these are skipped.
"""

import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, "build", "mcp-servers")
OFFICIAL, NODE = "@modelcontextprotocol/server-{}@2026.8.31", "node_modules/.bin/mcp-server-{}"
#: Name: registry, package, path of the program in the environment.
SERVERS = {
    "time": ("pypi", "mcp-server-time==2026.10.19", "bin/mcp-server-time"),
    "git": ("pypi", "mcp-server-git==2026.10.19", "bin/mcp-server-git"),
    "fetch": ("pypi", "mcp-server-fetch==2026.10.24", "bin/mcp-server-fetch"),
    "filesystem": ("npm", OFFICIAL.format("filesystem"), NODE.format("filesystem")),
    "everything": ("npm", OFFICIAL.format("everything"), NODE.format("everything")),
    "memory": ("npm", OFFICIAL.format("memory"), NODE.format("memory")),
}


def program(name):
    return os.path.join(FOLDER, name, SERVERS[name][2])


def main():
    names = sys.argv[1:] or list(SERVERS)
    unknown = [name for name in names if name not in SERVERS]
    if unknown:
        sys.exit(f"{unknown[0]}: no such server (there are: {', '.join(SERVERS)})")
    failed = [name for name in names if not install(name)]
    if failed:
        sys.exit(f"not installed: {', '.join(failed)}")


def install(name):
    """Install a server, unless it is there; returns whether it is there now."""
    registry, package, _ = SERVERS[name]
    if os.path.exists(program(name)):
        print(f"  {name}: is there")
        return True
    folder = os.path.join(FOLDER, name)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"  {name}: installing {package}", flush=True)
    try:
        if registry == "npm":
            os.makedirs(folder)
            run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, package)
        else:
            run(sys.executable, "-m", "venv", folder)
            python = os.path.join(folder, "bin", "python")
            run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", package)
            if name == "fetch":  # installed at its first use otherwise, which its sandbox prevents
                run(python, "-c", "import readabilipy.utils as utils; utils.run_npm_install()")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"  {name}: {error}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return os.path.exists(program(name))


def run(*words):
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
