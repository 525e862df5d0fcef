"""The proxy: the network of agents that reach single hosts (`aios-run --net HOST`).

Such an agent is in a network of its own, from which no route leads out. What listens there (`birth.gates`) is served
here: a proxy for HTTP, which resolves names itself and connects only to what the agent was granted.

    spec.py       its settings
    main.py       the process; it has loaded nothing until the first agent needs it
    serving.py    its loop: gates from the kernel, the channel, heartbeats
    proxy.py      gates, their connections, and the limits of each agent
    shares.py     whose the time is that the proxy uses
    request.py    what a client sends, taken apart (pure)
    dialing.py    from a granted host to a connection with a public address

    invariant: a connection belongs to the agent at whose gate it was accepted; nothing that comes over it says whose
               it is
    invariant: it leads to an address that was checked, and that a grant's name was resolved to
"""
