"""The tool manager: which tools there are, and their calls.

    definition   what a tool is: from a Python function to name, description and JSON Schema
    admission    which call may begin: locks, instances, order, fairness (pure)
    worker       a process that has loaded one file of tools and runs their calls, one at a time
    pool         the worker processes: start, limits, results, end; meter: what calls in them use
    main         the service: registry, checks of arguments, and the calls on their way through the other parts
    builtin      the tools that every system has (web: what fetches for them)
    direct       … those that need no worker; errands: calls that the kernel makes for them
    bridge       a worker whose tools are an MCP server's; mcpstreams: its messages; pins: its descriptions, remembered
    concerns     what a call amounts to, for rules and people; held: what it may open, as it was when it was allowed
    messages     what service and workers send each other
    spec         its settings

The service itself runs no tool and imports no file of tools. So whatever a tool does, it can harm its own call alone.
"""
