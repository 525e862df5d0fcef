"""A core whose model is elsewhere: any endpoint that speaks OpenAI's API, over http or https.

    limits.py     how often and when to try: rates, back-off, circuit breaker (pure)
    body.py       a call as the endpoint's JSON; what cannot be passed on is refused by name
    answer.py     the endpoint's chunks as pieces of text, tool calls and usage; checked against tools and schema
    chances.py    log probabilities in a chunk (pure)
    keys.py       the key to the endpoint
    connections.py   where it is, and connections that are kept
    vectors.py    texts whose vectors it makes, and the answers to them (pure)
    exchange.py   one request on a thread of its own
    call.py       one generation, or one call for vectors
    bill.py       what it has cost (pure)
    past.py       those that have ended, for a new kernel (pure)
    queue.py      which calls there are, parking, policy
    bell.py       what ends the sleep of the core's loop
    attempts.py   requests of a call: what comes of them, retries, going on after a loss, what is charged
    backend.py    the backend: the kernel's messages, rounds of the loop, who is asked next

Nothing here imports llama.cpp. The key is read for every request, and is in no message, log or setting.
"""
