"""A plugin of pytest for other people's tests (`conformance`): each of their requests has the token of this run.

They know nothing of tokens, or test with one that is none. Requests to the usual address of AIOS go to the gateway. All
else is as they make it.
"""

import os

TOKEN = os.environ["CONFORMANCE_TOKEN"]
#: Where AIOS listens, and where it is now.
AIOS, KERNEL = "http://localhost:8000", os.environ["CEREBRUM_KERNEL_URL"]
HEADER = {"Authorization": f"Bearer {TOKEN}"}


def pytest_configure(config):
    _openai()
    _requests()


def _openai():
    import openai

    for kind in (openai.OpenAI, openai.AsyncOpenAI):
        original = kind.__init__

        def init(self, *args, original=original, **kwargs):
            original(self, *args, **(kwargs | {"api_key": TOKEN}))

        kind.__init__ = init


def _requests():
    try:
        import requests
    except ImportError:
        return
    original = requests.Session.request

    def request(self, method, url, **kwargs):
        url = KERNEL + url.removeprefix(AIOS) if url.startswith(AIOS) else url
        kwargs["headers"] = HEADER | (kwargs.get("headers") or {})
        return original(self, method, url, **kwargs)

    requests.Session.request = request
