"""Logs: of aiosd's own processes, and of detached agents.

processlog.py  lines on stderr, each with the name of the process that wrote it
agentlog.py    the files of an agent's log, the index beside them, and reading them in order
"""
