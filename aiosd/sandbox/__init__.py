"""The sandbox: what an agent may reach on the machine.

An agent that is confined has a *box*: a level, files that it may read and write, a workspace, and whether it has a
network. The kernel decides on the box (`box`); the agent's own process makes a plan of it (`plan`) and carries it out
with one call of C (`confine`, `native/confine.c`), before the agent's program is looked up. What is carried out cannot
be undone, and holds for everything that the agent starts.

    none   nothing is confined: the agent has all the rights of the user
    flat   files by Landlock, system calls by seccomp (`filter`), no capabilities
    cage   the same, and of the machine's files it sees only what it may reach: mounts of its own (`places`, `cage`)

Which groups have which box is in `boxgroups`, what stays read-only in `protected`, the way to aiosd's socket in
`doors`, rights on files in `landlock`; `why` tells why a path is denied. `probe` finds out at the start what this
machine can do, by doing it: what its settings say misleads.
"""
