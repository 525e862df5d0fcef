"""The tool manager: the list of tools, and their calls.

    definition   from a Python function to the tool's name, description and JSON Schema
    admission    which call may begin: locks, instances, order, fairness (pure)
    worker       a process that has loaded one file of tools and runs their calls, one at a time
    pool         the worker processes: start, limits, results, end; meter: the usage of calls in them
    main         the service: registry, checks of arguments, and the calls on their way through the other parts
    builtin      the tools that every system has (web: fetching for them)
    direct       … those that need no worker; errands: system calls that the kernel makes for them
    bridge       a worker whose tools are an MCP server's; mcpstreams: its messages; pins: hashes of its descriptions
    concerns     the deeds of calls, for rules and people; held: files and hosts that an allowed call may open
    messages     messages between the service and its workers
    spec         the settings of the service
The service itself runs no tool and imports no file of tools. So whatever a tool does, it can harm its own call alone.
"""
