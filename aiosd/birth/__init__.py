"""Birth: from the supervisor to a running agent.

fork.py        fork, and what every child does first
spares.py      processes forked ahead of need, in batches
report.py      how a forked child reports whether it can be the agent that it should be
modules.py     which modules an agent finds imported
rehearsal.py   an agent's first calls, made before the first fork, so that agents share the warm memory
heap.py        keeps new objects out of the holes between shared ones
layout.py      puts the code that every agent runs side by side in memory
confinement.py a new agent confines itself
agent.py       from a forked child to an agent
title.py       the agent's name in `ps`
program.py     the agent's program: a script, a module, another program
denial.py      explains what the sandbox has denied, and what would allow it
frames.py      its tracebacks
end.py         its end
bootstrap.py   the first code of a template, in any interpreter
template.py    a process that has imported modules, and from which agents are forked
warmup.py      uses imported modules in a template, so that agents share what that makes
"""
