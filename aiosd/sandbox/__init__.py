"""The sandbox: limits what an agent can reach on the machine.

A confined agent has a *box*: a level, files that it may read and write, a workspace, and its network. The kernel
decides on the box (`box`); the agent's own process makes a plan from it (`plan`) and carries it out with one call of C
(`confine`, `native/confine.c`), before the agent's program is looked up. The confinement cannot be undone, and holds
for everything that the agent starts.

    none   nothing is confined: the agent has all the rights of the user
    flat   files by Landlock, system calls by seccomp (`filter`), no capabilities
    cage   the same, with mounts of its own: it sees only files that it may reach (`places`, `cage`)

`boxgroups` has the boxes of groups, `protected` the files that stay read-only, `doors` the way to aiosd's socket,
`landlock` rights on files; `why` explains why a path is denied. At the start `probe` tests what this machine can do,
because its settings can be misleading.
"""
