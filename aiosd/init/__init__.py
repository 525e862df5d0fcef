"""Init: what starts and ends everything. The guardian forks the supervisor, and the supervisor all the rest.

guardian.py    the process that the user started: lock, control socket, signals; waits, and sweeps up
supervisor.py  forks, reaps, forks again; serves the kernel's wishes for agents
records.py     what the supervisor remembers, and a new kernel is born with
pids.py        pids that are never used twice
notify.py      readiness and stopping, for systemd and for whoever started us in the background
sweep.py       the end of everything below a process
"""
