"""Money: prices of models and budgets of money, which count calls whose core dies or whose caller leaves, too."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd import config
from aiosd.budgets import price
from aiosd.budgets.price import Price
from aiosd.errors import UsageError
from aiosd.ipc import link
from aiosd.units import MONEY, format_money, parse_money
from libaios.home import Home
from libaios.wire import Sampling
from tests.conftest import System
from tests.fakeendpoint import Endpoint, Handler, answers, hangs, status, vectors
from tests.remotebench import Make, make, short_pauses

__all__ = ["make", "short_pauses"]  # fixtures

PRICE = Price(prompt=1000, completion=10_000, cached=100)


# ── amounts ───────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 10**18))
def test_amounts_are_exact(amount: int) -> None:
    assert parse_money(format_money(amount)) == amount
    assert Decimal(format_money(amount)) * MONEY == amount


@pytest.mark.parametrize(
    ("text", "amount"),
    [("2.50", 2_500_000_000_000), (3, 3 * MONEY), (0.15, 150_000_000_000), (1e-06, 1_000_000), ("0", 0)],
)
def test_money_is_read(text: Any, amount: int) -> None:
    assert parse_money(text) == amount


@pytest.mark.parametrize("text", ["", "-1", "1,5", "$2", "1e5", "nan", "inf", True, None, "1." + "1" * 13, 10**7, "٣"])
def test_invalid_amounts_of_money(text: Any) -> None:
    with pytest.raises(ValueError, match=r"money|decimals|range"):
        parse_money(text)


def test_prices() -> None:
    found = price.read("0.15,0.60,0.075")
    assert found == Price(150_000, 600_000, 75_000) == price.read([0.15, 0.6, 0.075])
    assert price.read("0.15, 0.60").cached == 150_000
    assert found.of_prompt(1000, 400) + found.of_completion(10) == 600 * 150_000 + 400 * 75_000 + 6_000_000
    for wrong in ("1", "1,2,3,4", "a,b", 5, "0.1234567,1"):
        with pytest.raises(ValueError, match=r"price|money|decimals"):
            price.read(wrong)


def test_a_price_stands_with_its_model(tmp_path: Path) -> None:
    (tmp_path / "aiosd.toml").write_text('[[model]]\nurl = "http://h/v1"\nmodel = "m"\nprice = "0.15,0.60"\n')
    (model,) = config.load({}, Home(tmp_path), environ={}, cwd="/").models
    assert model.price == Price(150_000, 600_000, 150_000)
    (tmp_path / "aiosd.toml").write_text('[[model]]\nurl = "http://h/v1"\nmodel = "m"\nprice = "cheap"\n')
    with pytest.raises(UsageError, match=r"line 4: price: 'cheap' is no price"):
        config.load({}, Home(tmp_path), environ={}, cwd="/")


# ── what a core does with it ──────────────────────────────────────────────────────────────────────────────


def submit(bench: Any, money: int | None, **args: Any) -> link.CallKey:
    key = bench.submit()
    made = bench.remote._queue.calls.pop(key).submit
    bench.send(link.Submit(key, made.request, money=money, **args))
    return key  # type: ignore[no-any-return]


def test_a_call_requests_no_more_tokens_than_the_budget_can_pay(make: Make) -> None:
    bench = make(answers(*"abcdef", reason="length", usage=None), price=PRICE)
    bench.end(bench.submit())
    prompt = bench.prompts((1, 1)) * PRICE.prompt
    key = submit(bench, prompt + 3 * PRICE.completion)
    assert bench.end(key).finish_reason == "limit"
    assert bench.endpoint.asked[-1][1]["max_tokens"] == 3
    failed = bench.end(submit(bench, prompt + PRICE.completion - 1))
    assert (failed.errno, failed.short, failed.elsewhere) == (errno.EDQUOT, "cost", True)
    assert len(bench.endpoint.asked) == 2


def test_the_callers_own_limit_is_not_taken_for_the_budgets(make: Make) -> None:
    bench = make(answers("a", reason="length"), price=PRICE)
    key = bench.submit(sampling=Sampling(max_tokens=1), budget=1 << 20)
    assert bench.end(key).finish_reason == "length"


def test_a_prompt_is_charged_when_it_is_sent(make: Make) -> None:
    """So a caller that leaves before the answer pays for it. A refused prompt is free."""
    bench = make(hangs(), price=PRICE)
    key = bench.submit()
    bench.until(lambda: bench.endpoint.asked)
    assert bench.prompts(key) > 10
    refused = make(status(400))
    key = refused.submit()
    refused.end(key)
    assert refused.prompts(key) == 0


def test_a_new_kernel_gets_all_that_was_charged(make: Make) -> None:
    bench = make(status(500), hangs("one "))
    key = bench.submit()
    bench.until(lambda: bench.deltas(key))
    before = bench.prompts(key)
    bench.channel.sent.clear()
    bench.again(key)
    assert bench.prompts(key) == before > 0
    done = make(answers("x"))
    key = done.submit()
    done.end(key)
    done.channel.sent.clear()
    done.again(key)
    assert (done.prompts(key), done.charged(key)) == (11, 3)


# ── a whole system ────────────────────────────────────────────────────────────────────────────────────────

AGENT = """
import sys, time
import libaios as aios
model = sys.argv[1]
while True:
    r = aios.llm.chat([{"role": "user", "content": "hi"}], max_tokens=8, model=model)
    print(r.finish_reason, r.model, flush=True)
    if len(sys.argv) > 2:
        time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def endpoint() -> Any:
    answer, rows = answers("a", usage={"prompt_tokens": 1000, "completion_tokens": 100}), vectors(tokens=1000)
    made = Endpoint(lambda handler: (rows if handler.path.endswith("embeddings") else answer)(handler))
    yield made
    made.close()


def test_a_budget_of_money_ends_an_agent(
    fresh_aiosd: Callable[..., System], tmp_path: Path, endpoint: Endpoint
) -> None:
    """The same for a group. Models without a price can still be used."""
    script = tmp_path / "agent.py"
    script.write_text(AGENT)
    toml = f'[[model]]\nname = "far"\nurl = "{endpoint.url}"\nmodel = "m"\nprice = "10,100"\n'
    toml += f'[[model]]\nname = "unpriced"\nurl = "{endpoint.url}"\nmodel = "m"\n'
    toml += '[[model]]\nname = "near"\npath = "nano"\n[route]\nany = ["far", "near"]\n'
    toml += '[[group]]\nname = "g"\ncost = "0.07"\n'
    (tmp_path / "aiosd.toml").write_text(toml)
    system = fresh_aiosd("--config", str(tmp_path / "aiosd.toml"))
    # A call costs 1000 * 0.00001 + 100 * 0.0001 = 0.02.
    done = system.run("aios-run", "--cost", "0.05", "--name", "spender", script, "far")
    assert done.returncode == 124, done.stderr
    assert "cost budget of 0.05 used up" in done.stderr
    assert done.stdout.split() == ["stop", "far"] * 2 + ["stop", "far"]
    shown = system.run("aios-ps", "-e", "--dead", "-C", "spender", "-o", "cost=,budget=").stdout.split()
    assert shown == ["0.06", "cost"], "the endpoint alone knows at the end how long a prompt was"
    embeds = "import libaios as aios\nwhile True: print(aios.llm.embed('x', 'far').shape, flush=True)"
    vectored = system.run("aios-run", "--cost", "0.025", "--", sys.executable, "-c", embeds)
    assert (vectored.returncode, vectored.stdout.splitlines()[:2]) == (124, ["(1, 2)"] * 2), vectored.stderr
    assert "cost budget of 0.025 used up" in vectored.stderr
    first = system.run("aios-run", "-g", "g", "--cost", "0.03", script, "far")
    rest = system.run("aios-run", "-g", "g", script, "far")  # gets the rest of the group's budget
    assert (first.returncode, len(first.stdout.splitlines())) == (124, 2)
    assert (rest.returncode, len(rest.stdout.splitlines())) == (124, 2)
    assert "cost budget of 0.07 used up by group g" in rest.stderr
    unpriced = system.run("aios-run", "--cost", "1", script, "unpriced")
    assert "what unpriced costs is not known" in unpriced.stderr
    job = system.popen("aios-run", "--cost", "0.03", script, "any", "0.01")
    assert job.stdout is not None
    models = [job.stdout.readline().split()[1] for _ in range(4)]
    assert models == ["far", "far", "near", "near"]
    (agent,) = [one for one in system.ps() if one["name"] == "agent"]
    found = json.loads(system.run("aios-inspect", str(agent["pid"]), check=True).stdout)
    kinds = found[0]["budgets"][0]["kinds"] if isinstance(found, list) else found["budgets"][0]["kinds"]
    assert kinds["cost"] == {"limit": "0.03", "used": "0.04", "lag_s": None}
    system.run("aios-kill", str(agent["pid"]), check=True)
    job.communicate(timeout=30)
    system.calm_down()


def test_money_survives_the_kernel(fresh_aiosd: Callable[..., System], tmp_path: Path, endpoint: Endpoint) -> None:
    script, go = tmp_path / "agent.py", threading.Event()
    script.write_text(AGENT)

    def waits(handler: Handler) -> None:
        go.wait(20)
        answers("a", usage={"prompt_tokens": 1000, "completion_tokens": 100})(handler)

    endpoint.deeds.append(waits)
    endpoint.deeds.append(endpoint.deeds[0])
    system = fresh_aiosd("--model", f"far={endpoint.url}#m", "--price", "10,100")
    job = system.popen("aios-run", "--cost", "0.06", script, "far")
    assert job.stdout is not None
    job.stdout.readline()
    (kernel,) = (one for one in system.ps() if one["name"] == "kernel")
    os.kill(kernel["ospid"], signal.SIGKILL)
    go.set()
    rest, errors = job.communicate(timeout=30)
    assert job.returncode == 124, errors
    assert rest.split() == ["stop", "far"] * 2
    system.calm_down()
