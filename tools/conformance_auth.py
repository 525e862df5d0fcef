"""A plugin of pytest for other projects' tests (`conformance`): it adds the token of this run to each request.

These tests send no token, or an invalid one. Requests to the usual address of AIOS are sent to the gateway. Nothing
else of a request is changed.
"""

import os

TOKEN = os.environ["CONFORMANCE_TOKEN"]
#: The address where AIOS listens, and the gateway's, which replaces it.
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
