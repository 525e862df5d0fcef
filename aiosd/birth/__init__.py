"""Birth: from the supervisor to a running agent.

fork.py        fork, and what every child does first
spares.py      processes forked ahead of need, in batches
rehearsal.py   an agent's first calls, made before the first fork, so that agents share what that leaves behind
agent.py       from a forked child to an agent
program.py     what it runs: a script, a module, a program
"""
