"""A core whose model is elsewhere: any endpoint that speaks OpenAI's API, over http or https.

    limits.py     how often and when to try: rates, back-off, circuit breaker (pure)
    body.py       a call as the endpoint's JSON; what cannot be passed on is refused by name
    answer.py     the endpoint's chunks as pieces of text, tool calls and usage; checked against tools and schema
    keys.py       the key to the endpoint
    connections.py   where it is, and connections that are kept
    exchange.py   one request on a thread of its own
    call.py       one generation
    bill.py       what it has cost (pure)
    past.py       those that have ended, for a new kernel (pure)
    backend.py    the backend: queue, policy, parking, retries, going on after a loss

Nothing here imports llama.cpp. The key is read for every request, and is in no message, log or setting.
"""
