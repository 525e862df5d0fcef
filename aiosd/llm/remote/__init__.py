"""A core for a remote model: any endpoint with OpenAI's API, over http or https.

    limits.py     how often and when to try: rates, back-off, circuit breaker (pure)
    body.py       a call as the endpoint's JSON; options that cannot be passed on are refused by name
    answer.py     the endpoint's chunks as pieces of text, tool calls and usage; checked against tools and schema
    chances.py    log probabilities in a chunk (pure)
    keys.py       the key to the endpoint
    connections.py   the address of the endpoint, and connections that are kept
    vectors.py    texts for which the endpoint makes vectors, and its answers (pure)
    exchange.py   one request on a thread of its own
    call.py       one generation, or one call for vectors
    bill.py       the cost of a call (pure)
    past.py       calls that have ended, for a new kernel (pure)
    queue.py      the calls, parking, policy
    bell.py       what ends the sleep of the core's loop
    attempts.py   requests of a call: their results, retries, going on after a loss, what is charged
    backend.py    the backend: the kernel's messages, rounds of the loop, which request is sent next

Nothing here imports llama.cpp. The key is read for every request, and is in no message, log or setting.
"""
