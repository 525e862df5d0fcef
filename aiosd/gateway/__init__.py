"""The gateway: HTTP for programs that were written for other model servers. Each such program is an agent here, without
a change to its code.

    program ──HTTP──▶ gateway ──control socket──▶ kernel          one connection for each agent

The gateway is a service with a process of its own, and keeps nothing that matters: it dies and is replaced, the kernel
dies and is replaced, and a program sees at most a connection that broke. The identity of a caller is always proved: by
a token that the kernel made for one agent, sent by a process that is, or descends from, that agent (`identity`,
`accounts`), or by all processes that have the connection (`owners`).

    spec.py       its settings, as the supervisor passes them at its start
    main.py       the process: idle until the first connection, then `server`
    server.py     its loop: accepts connections, waits for events
    connection.py one TCP connection (uvicorn's protocol)
    strangers.py  connections whose agent is not known yet
    web.py        a request and its reply; errors
    places.py     which field an error is about, in each API's words
    whose.py      which agent sent a request
    identity.py   which process is at the other end of a connection
    holders.py    … and all that have it, for many connections at once
    owners.py     the agent of a connection without a token
    greetings.py  connections to the kernel in the name of an agent
    accounts.py   the agents that are served, with a connection to the kernel for each
    pacer.py      when pieces of streams from the kernel are passed on
    calls.py      system calls for coroutines, and streams that end when their reader leaves
    openai/       the API of OpenAI
    ollama.py cerebrum.py filing.py submitted.py     those of Ollama and of AIOS, made from the same parts
    routes.py health.py       which function answers which path; /health and /metrics, which need no token
"""
