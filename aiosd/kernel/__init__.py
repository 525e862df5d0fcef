"""The kernel process: system calls, process table, access checks, queues. It routes messages, and never waits for
another process."""
