"""Birth: from the supervisor to a running agent.

fork.py        fork, and what every child does first
spares.py      processes forked ahead of need, in batches
report.py      how a forked child reports whether it can be the agent that it should be
modules.py     what an agent finds imported
rehearsal.py   an agent's first calls, made before the first fork, so that agents share what that leaves behind
agent.py       from a forked child to an agent
title.py       what `ps` shows of it
program.py     what it runs: a script, a module, a program
frames.py      its tracebacks
end.py         its end
"""
