"""The proxy: the network of agents that reach single hosts (`aios-run --net HOST`).

Such an agent is in a network of its own, from which no route leads out. The proxy serves the sockets that listen there
(`birth.gates`): it is a proxy for HTTP, which resolves names itself and connects only to hosts that the agent was
granted.

    spec.py       its settings
    main.py       the process; it has loaded nothing until the first agent needs it
    serving.py    its loop: gates from the kernel, the channel, heartbeats
    proxy.py      gates, their connections, and the limits of each agent
    shares.py     divides the proxy's processor time among agents
    request.py    parses the head of a request (pure)
    dialing.py    from a granted host to a connection with a public address

    invariant: a connection belongs to the agent at whose gate it was accepted; no data of it can change that
    invariant: it leads to an address that was checked, and to which a granted name was resolved
"""
