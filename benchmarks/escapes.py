#!/usr/bin/env python
"""What an agent can do that it should not, in each level of the sandbox, and what stops it.

    $ python benchmarks/escapes.py
    deed                        none    flat           flat, network
    read_hidden                 done    EACCES         EACCES
    tcp_local                   done    EAFNOSUPPORT   done (accepted)
    …

The deeds are those of the tests (`tests/deeds`). Each is done in a process of its own, first without a sandbox: one
that cannot be done there proves nothing, and is not counted. Exit code 1: a deed was done that is not accepted.

Results go to benchmarks/results/escapes.json.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
