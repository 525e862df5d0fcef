"""The gateway: programs that speak HTTP as other model servers do are agents here, unchanged.

    program ──HTTP──▶ gateway ──control socket──▶ kernel          one connection for each agent

It is a service with a process of its own, and keeps nothing that matters: it dies and comes back, the kernel dies and
comes back, and a program sees at most a connection that broke. Who calls is proved, never believed: a token that the
kernel made for one agent, from a process that is, or descends from, that agent (`identity`, `accounts`).

    spec.py       what it gets at its start
    main.py       the process: idle until the first connection, then `server`
    server.py     its loop: accepts connections, waits for what comes
    connection.py one of these (uvicorn's protocol)
    strangers.py  those of which it is not known yet whose they are
    web.py        a request and its reply; errors
    places.py     which field an error is about, in each API's words
    identity.py   which process is at the other end of a connection
    accounts.py   the agents that are served, with a connection to the kernel for each
    pacer.py      when what the kernel sends of streams is passed on
    calls.py      system calls for coroutines, and streams that end when their reader leaves
    openai/       the API of OpenAI
    ollama.py cerebrum.py filing.py submitted.py     those of Ollama and of AIOS, made from the same parts
    routes.py health.py       which function answers which path; what is open to all
"""
