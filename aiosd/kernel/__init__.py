"""The kernel process: system calls, process table, access checks, queues. A router, which never waits for another
process."""
