"""Init: the processes that start and end everything. The guardian forks the supervisor, which forks all others.

guardian.py    the process that the user started: lock, control socket, signals; waits, and sweeps up
supervisor.py  forks, reaps, forks again; starts and signals agents for the kernel
records.py     what the supervisor remembers, and a new kernel inherits
pids.py        pids that are never used twice
notify.py      readiness and stopping, for systemd and for the process that started us in the background
sweep.py       the end of everything below a process
"""
