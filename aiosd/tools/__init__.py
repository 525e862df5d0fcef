"""The tool manager: which tools there are, and their calls.

    definition   what a tool is: from a Python function to name, description and JSON Schema
    admission    which call may begin: locks, instances, order, fairness (pure)
    worker       a process that has loaded one file of tools and runs their calls, one at a time
    pool         the worker processes: start, limits, results, end
    main         the service: registry, checks of arguments, and the calls on their way through the other parts
    builtin      the tools that every system has (web: what fetches for them)
    messages     what service and workers send each other
    spec         its settings

The service itself runs no tool and imports no file of tools. So whatever a tool does, it can harm its own call alone.
"""
