"""Init: the processes that start and end everything. The guardian forks the supervisor, which forks all others.

guardian.py    the process that the user started: lock, control socket, signals; waits, and sweeps up
supervisor.py  forks, reaps, forks again: the kernel and the services; the order in which all ends
kernellink.py  the supervisor's link to the kernel
agents.py      starts and signals agents for the kernel
births.py      agents that are forked, and have not reported yet whether they can start
templates.py   warm processes from which agents may be forked: started when wanted, ended when idle
servers.py     MCP servers, forked for the toolbox
orphans.py     processes that a dead agent has left behind
signals.py     received signals with their senders; signals to agents
services.py    which services a system has
environment.py hides the environment in which aiosd was started from agents
restart.py     when an agent that has ended is started again (pure; kernel and settings use it, too)
apart.py       reads the settings in a process of its own, so that nothing of them stays in the supervisor
records.py     the supervisor's records, which a new kernel inherits
pids.py        pids that are never used twice
notify.py      messages about readiness and stopping, for systemd and for `aiosd -d`
sweep.py       ends everything below a process
"""
