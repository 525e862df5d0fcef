"""GET /health and /metrics: open to all programs of this machine; they contain nothing about any single agent."""

from __future__ import annotations

from aiosd.gateway.web import HttpRequest


async def health(request: HttpRequest) -> None:
    await request.reply({"status": "ok"})


async def metrics(request: HttpRequest) -> None:
    """Counters in the text format of Prometheus."""
    counters = request.app.counters
    lines = ["# TYPE aios_gateway_requests_total counter"]
    for status, count in sorted(counters.requests.items()):
        lines.append(f'aios_gateway_requests_total{{status="{status}"}} {count}')
    for name, value in (
        ("cancelled", counters.cancelled),
        ("prompt_tokens", counters.prompt_tokens),
        ("completion_tokens", counters.completion_tokens),
    ):
        lines += [f"# TYPE aios_gateway_{name}_total counter", f"aios_gateway_{name}_total {value}"]
    lines += ["# TYPE aios_gateway_streams gauge", f"aios_gateway_streams {counters.streams}"]
    await request.reply_bytes("".join(f"{line}\n" for line in lines).encode(), b"text/plain; version=0.0.4")
