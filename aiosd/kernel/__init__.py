"""The kernel process: system calls, process table, access checks, queues. A router that waits for nobody."""
