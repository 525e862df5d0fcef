"""The cheap parts of the benchmarks: options, workloads, arithmetic, tables, plots, and one tiny run of each that needs
nothing but aiosd."""

import argparse
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aiosd.llm import llama
from benchmarks import (
    attention,
    busy,
    crowd,
    exactness,
    fairness,
    floor,
    gateway,
    harness,
    lookup,
    lruk,
    models,
    quality,
    remote,
    scale,
    search,
    switch,
    talk,
    tools,
)
from tests.tinymodels import OWN_ATTENTION, write

ONE = ["--threads", "1"]


# ── workloads ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_benchmark_that_is_ended_leaves_no_folder():
    script = f"""
import signal, sys, tempfile
sys.argv[0] = {str(harness.ROOT / "benchmarks" / "crowd.py")!r}
from benchmarks import harness
folder = tempfile.TemporaryDirectory(prefix="aios-bench-")
print(folder.name, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=harness.ROOT, stdout=subprocess.PIPE, text=True) as ended:
        folder = Path(ended.stdout.readline().strip())
        assert folder.is_dir()
        ended.terminate()
        assert ended.wait(30) == 128 + signal.SIGTERM
    assert not folder.exists()


def test_the_prefix_is_shared_and_nothing_else():
    orders = crowd.workload(5, 96, seed=3, vocab=1000)
    prompts = [order["prompt"] for order in orders]
    assert {len(prompt) for prompt in prompts} == {96 + crowd.PRIVATE}
    assert {tuple(prompt[:96]) for prompt in prompts} == {tuple(prompts[0][:96])}
    assert len({tuple(prompt[96:100]) for prompt in prompts}) == 5
    assert all(len(order["tools"]) == crowd.TURNS for order in orders)
    assert max(max(prompt) for prompt in prompts) < 1000


def test_a_seed_gives_the_same_workload_and_another_another():
    assert crowd.workload(2, 16, 1, 500) == crowd.workload(2, 16, 1, 500)
    assert crowd.workload(2, 16, 1, 500)[0]["prompt"][:16] != crowd.workload(2, 16, 2, 500)[0]["prompt"][:16]


def test_turns_of_a_tool_are_read_from_what_it_wrote():
    lines = ["begin 1 0", "end 1 0", "begin 2 0", "end 2 0", "begin 1 1", "end 1 1", "begin 2 1", "end 2 1"]
    order = tools.turns(lines)
    assert order == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert tools.apart(order, 2) == 1
    assert tools.apart([(1, 0), (1, 1), (2, 0), (2, 1)], 2) == 2
    with pytest.raises(SystemExit, match="two calls at once"):
        tools.turns(["begin 1 0", "begin 2 0", "end 1 0", "end 2 0"])


def test_distinct_tokens_are_those_that_must_be_computed_once():
    orders = crowd.workload(3, 32, 1, 500)
    beginnings = {tuple(order["prompt"][:i]) for order in orders for i in range(1, len(order["prompt"]) + 1)}
    answers = sum(len(tool) for order in orders for tool in order["tools"][:-1])
    assert crowd.distinct_tokens(3, 32) == (len(beginnings) + answers, 3 * crowd.TURNS * crowd.GENERATED)


def test_conversations_share_their_system_prompt_and_nothing_else(tmp_path):
    text = talk.Text(write(tmp_path / "tiny.gguf", d=32, layers=1, heads=2, kv_heads=1, ff=32))
    sizes = talk.Sizes(private=40, turns=3, generate=8, tool=20)
    orders = talk.workload(text, 4, 300, 7, 0.8, sizes)
    assert text.chat
    assert orders == talk.workload(text, 4, 300, 7, 0.8, sizes)
    systems = {order["messages"][0]["content"] for order in orders}
    assert systems != {order["messages"][0]["content"] for order in talk.workload(text, 4, 300, 8, 0.8, sizes)}
    (system,) = systems
    questions = [order["messages"][1]["content"] for order in orders]
    assert len(set(questions)) == 4
    assert text.count(system) == 300
    assert {text.count(question) for question in questions} == {40}
    assert {text.count(tool) for order in orders for tool in order["tools"]} == {20}
    assert {len(order["tools"]) for order in orders} == {3}
    text.close()


def test_real_models_run_on_real_text_at_two_temperatures():
    cells = list(crowd.grid(crowd.parse(["--real", "--n", "64"])))
    assert cells[:4] == [("smollm2", 64, 512, 0.0), ("smollm2", 64, 512, 0.8), ("smollm2", 64, 1500, 0.0),
                         ("smollm2", 64, 1500, 0.8)]  # fmt: skip
    assert {cell[0] for cell in cells} == {"smollm2", "gemma3"}
    assert list(crowd.grid(crowd.parse(["--quick"]))) == [("small", 64, 512, 0.0)]
    assert all(name in crowd.BARS for name in crowd.REAL)


def test_a_conversation_fits_its_context():
    for prefix in crowd.PREFIXES:
        longest = prefix + crowd.PRIVATE + crowd.TURNS * (crowd.GENERATED + crowd.TOOL)
        assert longest <= crowd.context_of(prefix) < longest + 256


# ── arithmetic ────────────────────────────────────────────────────────────────────────────────────────────


def test_jains_index():
    assert harness.jain([3.0, 3.0, 3.0]) == pytest.approx(1)
    assert harness.jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_percentiles_are_values_that_were_measured():
    assert harness.percentile([5.0, 1.0, 3.0], 0.5) == 3.0
    assert harness.percentile(list(range(100)), 0.9) == 90
    assert harness.percentile([7.0], 0.99) == 7.0


def test_bleu():
    text = list(range(20))
    assert exactness.bleu(text, text) == pytest.approx(1)
    assert exactness.bleu(list(range(50, 70)), text) == 0
    half = exactness.bleu(text[:10], text)  # all of it right, half as long
    assert half == pytest.approx(2.718281828 ** (1 - 20 / 10))
    assert 0 < exactness.bleu([*text[:15], 90, 91, 92, 93, 94], text) < 1
    assert exactness.bleu([1], [1]) == pytest.approx(1)
    assert exactness.bleu([], [1]) == 0


def test_tokens_in_common_end_at_the_first_difference():
    assert exactness.common([1, 2, 9, 4], [1, 2, 3, 4]) == 2
    assert exactness.common([1, 2], [1, 2, 3]) == 2


# ── options, tables, plots ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("script", [attention, crowd, exactness, fairness, floor, quality, scale, switch])
def test_options(script):
    assert script.parse([]).threads == 2
    assert script.parse(["--threads", "1", "--model", "tiny"]).threads == 1
    with pytest.raises(SystemExit):
        script.parse(["--no-such-option"])


def test_single_cells_and_quick():
    options = crowd.parse(["--n", "64", "--prefix", "512"])
    assert (options.n, options.prefix) == ([64], [512])
    assert crowd.parse(["--quick"]).model == ["small"]


ROW = {
    "model": "small", "agents": 64, "prefix": 512, "temperature": 0.0,
    "aiosd_s": [18.0, 19.0], "server_s": [40.0, 42.0], "ratio": 0.45,
    "cpu_ratio": 0.46, "bar": 0.5, "lock_s": 50.0, "lock_ratio": 0.37, "lock_bar": 0.45,
}  # fmt: skip


def test_the_table_names_what_missed_its_bar():
    assert "MISSED" not in crowd.line(ROW)
    assert "MISSED" in crowd.line(ROW | {"ratio": 0.51})
    assert "MISSED" in crowd.line(ROW | {"lock_ratio": 0.46})
    without = {key: value for key, value in ROW.items() if not key.startswith("lock")}
    assert "MISSED" not in crowd.line(without | {"bar": None, "ratio": 2.0})


def test_results_carry_their_machine(tmp_path):
    path = harness.write("crowd", [ROW], tmp_path / "results" / "crowd.json", seed=7)
    written = json.loads(path.read_text())
    assert written["rows"] == [ROW]
    assert written["seed"] == 7
    assert written["hardware"]["cores"] >= 1


def test_a_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [ROW, ROW | {"agents": 16, "bar": None}]  # in a process of its own: matplotlib keeps its fonts open
    path = str(tmp_path / "crowd.png")
    script = f"from pathlib import Path\nfrom benchmarks import crowd\ncrowd.plot({rows!r}, Path({path!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=harness.ROOT, check=True)
    assert (tmp_path / "crowd.png").read_bytes().startswith(b"\x89PNG")


# ── tiny runs ─────────────────────────────────────────────────────────────────────────────────────────────


def test_clients_begin_at_once_and_answer():
    script = harness.LOOP + "serve(lambda order: {'twice': 2 * order['n']})"
    clients = [harness.Client([sys.executable, "-c", script]) for _ in range(3)]
    try:
        for client in clients:
            client.expect("connected")
        for _ in range(2):
            said = harness.race(clients, [{"n": i} for i in range(3)])
            assert [one["twice"] for one in said] == [0, 2, 4]
            assert harness.makespan(said) >= 0
    finally:
        for client in clients:
            client.close()


def test_a_client_that_dies_is_not_waited_for():
    client = harness.Client([sys.executable, "-c", "raise SystemExit(3)"])
    try:
        with pytest.raises(SystemExit, match="exit status 3"):
            client.expect("connected")
    finally:
        client.process.stdin.close()
        client.process.stdout.close()


def test_interrupted_texts_are_compared_through_the_whole_system(tmp_path):
    options = exactness.parse([*ONE, "--texts", "4", "--tokens", "12"])
    row = exactness.compare(str(write(tmp_path / "m.gguf", vocab=512)), True, options)
    assert (row["texts"], row["tokens"], row["same_texts"], row["bleu"]) == (4, 48, 1.0, pytest.approx(1))
    assert row["preemptions"] > 0
    assert row["preemptions_alone"] == 0
    assert "MISSED" not in exactness.line(row)
    assert "MISSED" in exactness.line(row | {"same_texts": 0.75})


@pytest.mark.alone
def test_busy_neighbours_leave_a_fair_share(tmp_path):
    assert [busy.fair(threads, k, 2) for threads, k in ((1, 1), (1, 2), (2, 1), (2, 2))] == [1, 2 / 3, 2 / 3, 0.5]
    options = busy.parse(["--rounds", "1", "--tokens", "4"])
    rows = busy.cell(str(write(tmp_path / "m.gguf", vocab=512)), 1, options)
    assert [row["busy"] for row in rows] == [1, 2]
    bar = rows[0]["bar"]  # it depends on the number of cores
    assert "MISSED" in busy.line(rows[0] | {"ratio": bar - 0.01})
    assert "MISSED" not in busy.line(rows[0] | {"ratio": bar + 0.01})


def test_guesses_are_measured_against_none_through_the_whole_system(tmp_path):
    chance = random.Random(1)
    assert all(text(chance, chat) != text(chance, chat) for text in lookup.TEXTS.values() for chat in (False, True))
    prompt = lookup.TEXTS["json"](chance, False).prompt
    assert prompt.count(prompt.rpartition("\n\n")[2]) == 2  # the text to copy, and its beginning in the answer
    options = lookup.parse([*ONE, "--agents", "1", "--tokens", "8", "--rounds", "1"])
    path = write(tmp_path / "m.gguf", vocab=512)
    default, off = lookup.LookaheadSide(path, options), lookup.LookaheadSide(path, options, "--lookahead", "off")
    try:
        row = lookup.cell(default, off, "m", "listing", 1, options)
        assert off.guesses() == {"why": "does not look ahead: --lookahead off", "guessed": 0, "right": 0}
        assert row["why"] != off.guesses()["why"]
    finally:
        off.system.close()
        default.system.close()
    assert (row["answers"], row["bar"]) == (1, 1.5)
    assert row["guessed"] >= row["right"] >= 0
    assert row["ratio"] > 0
    assert "MISSED" in lookup.line(row | {"ratio": 1.49})
    assert "MISSED" not in lookup.line(row | {"ratio": 1.51})


def test_a_crowd_scales_through_the_whole_system(tmp_path):
    options = scale.parse([*ONE, "--slots", "2", "--ram", "64M", "--disk", "64M", "--quantum", "8"])
    row = scale.run("rr", 5, write(tmp_path / "m.gguf", vocab=512), options)
    assert row["finished"] == 5
    assert row["preemptions"] > 0
    assert row["within_budget"]
    assert 0 < row["jain"] <= 1
    assert row["computed_tokens"] < 5 * (scale.SHARED + 100)  # the shared prompt was computed once
    assert "unfinished" in scale.line(row | {"finished": 4})


@pytest.mark.skipif(not OWN_ATTENTION, reason="needs a processor with AVX2")
def test_own_attention_is_as_good_as_llama_cpps_on_the_embedded_model():
    row = quality.compare(harness.model_path("nano"), quality.parse(["--tokens", "64", "--threads", "1"]))
    assert row["ours_used"]
    assert row["kept"], quality.line(row)
    assert row["top1_same"]["plain"] == 1.0
    assert "kept" in quality.line(row)
    assert "NOT USED" in quality.line(row | {"ours_used": False, "kept": False})


def test_random_weights_of_four_bits_are_a_model(tmp_path):
    """The shape of Llama 3.1 8B is made like this, for the check of a GPU."""
    shape = {"d": 64, "layers": 1, "heads": 2, "kv_heads": 1, "ff": 64, "vocab": 320}
    model = llama.Model(str(models.write_llama(tmp_path / "m.gguf", q4_0=True, **shape)), 0, lambda fraction: None)
    context = llama.LlamaContext(model, slots=1, ctx=64, ubatch=32, threads=1, flash_attention=False)
    batch = llama.BatchBuffer(4)
    batch.size, batch.tokens[:], batch.positions[:], batch.wanted[:] = 4, range(4), range(4), (0, 0, 0, 1)
    assert context.decode(batch) == llama.OK
    logits = context.logits(1)
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 100
    context.close()
    model.close()


def test_policies_of_eviction_are_what_they_are_called():
    trace = [1, 2, 3, 1, 4, 1, 2, 3, 5, 1]
    assert lruk.fifo(trace, 3) == 1
    assert lruk.lru(trace, 3) == 2
    assert lruk.belady(trace, 3) == 4
    rng = random.Random(3)
    for name in lruk.TRACES:
        found, size = lruk.TRACES[name](rng, 3000)
        hits = {policy: run(found, size) for policy, run in lruk.POLICIES.items()}
        assert len(found) == 3000
        assert max(hits.values()) == hits["belady"], name
        assert min(hits.values()) > 0, name
    scan = lruk.zipf(rng, 4000, 200, 1.0) + list(range(10_000, 14_000)) + lruk.zipf(rng, 4000, 200, 1.0)
    assert lruk.s3fifo(scan, 100) > lruk.lru(scan, 100)
    assert lruk.tinylfu(scan, 100) > lruk.lru(scan, 100)


def test_a_search_is_measured_and_right(tmp_path):
    options = argparse.Namespace(notes=1200, owners=3, dimensions=64, queries=5, peer_notes=0)
    row = search.one_owner(options, tmp_path / "one")
    assert row["search, recall@10"] == row["filtered, 10 %, recall@10"] == 1.0
    assert all(value >= 0 for value in row.values())
    assert "kept" in search.line("search, p50 CPU ms", 1.0)
    assert "MISSED" in search.line("filtered, 1 %, recall@10", 0.9)
    assert len(search.many_owners(options, tmp_path / "many")) == 4


def test_gateways_ratios_are_those_of_neighbours():
    first, again = (gateway.orders(3, 5, 8, seed, 1000) for seed in (1, 1))
    assert first == again != gateway.orders(3, 5, 8, 2, 1000)
    figures = [("sdk", 100, 2.0), ("gateway", 95, 2.2), ("gateway", 50, 4.4), ("sdk", 50, 4.0)]
    rows = [{"side": side, "tokens_per_s": rate, "first_s": first, "cpu_us": 30.0} for side, rate, first in figures]
    found = gateway.summary(rows)
    assert (found["rate_ratio"], found["first_ratio"]) == (0.975, pytest.approx(1.1))
    assert "MISSED" not in gateway.table(rows, found)[-1]
    assert "MISSED" in gateway.table(rows, found | {"rate_ratio": 0.8})[-1]


def test_a_model_elsewhere_is_measured_against_its_endpoint(monkeypatch):
    sent = []

    def race(clients, orders):
        sent.extend(prompt for order in orders for prompt in order["prompts"])
        return harness.race(clients, orders)

    monkeypatch.setattr(remote, "race", race)
    options = remote.parse(["--only-fake", "-n", "1", "--generate", "1", "8", "--tokens", "30", "--pairs", "1"])
    rows = remote.run(options)
    assert [row["side"] for row in rows[:4]] == ["direct", "aiosd", "aiosd", "direct"]
    assert {row["tokens"] / row["calls"] for row in rows} == {1, 8}
    assert len(set(sent)) == len(sent), "a prompt that the endpoint has in its cache costs its side less"
    short, long = remote.summary(rows)
    assert short["aiosd_ms"] > short["direct_ms"] > 0
    assert short["cpu_ms"] >= 0 <= short["endpoint_ms"]
    lines = remote.table([{**short, "endpoint": "llama-server", "ratio": 1.2}, short, {**long, "cpu_ms": 9.0}])
    assert "MISSED" in lines[1]
    assert lines[-1].startswith("aiosd adds, 1 at a time: ")


@pytest.mark.parametrize("script", ["store", "tools"])
def test_a_script_may_be_named_as_a_package(script):
    """When it is run as a file, its folder is on the path; `tools.py` there must not hide the package `tools`."""
    argv = [sys.executable, str(harness.ROOT / "benchmarks" / f"{script}.py"), "--help"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout.startswith("usage: ")
