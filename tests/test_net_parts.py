"""The pure parts of networks of single hosts: grants that cover others, public addresses, parsing of requests."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd import config
from aiosd.birth import denial
from aiosd.net import request
from aiosd.net.dialing import Dialer, Private, Unreachable
from aiosd.net.request import Bad, ProxyRequest
from aiosd.net.shares import PIECE, Shares
from aiosd.sandbox import addresses, box, hosts, why
from aiosd.sandbox.box import Box, SandboxSettings
from libaios import wire
from libaios.home import Home
from libaios.sandbox import wish

NAMES = st.sampled_from(["a.org", "b.a.org", "c.b.a.org", "aa.org", "x.net", "93.184.216.34", "2606:4700::1111"])
PORTS = st.sampled_from([0, 80, 443, 8443])
WORDS = st.builds(
    lambda star, host, port: str(hosts.HostGrant("*." + host if star and host[0].isalpha() else host, port)),
    st.booleans(),
    NAMES,
    PORTS,
)
NETS = st.one_of(st.sampled_from(["all", "none", "gateway"]), st.lists(WORDS, min_size=1, max_size=4).map(",".join))

# ── hosts ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_network_is_written_in_one_way() -> None:
    assert hosts.normal(["Example.ORG., *.a.net:8443", "example.org"]) == "example.org,*.a.net:8443"
    assert hosts.normal(["bücher.example"]) == "xn--bcher-kva.example"
    assert hosts.normal(["[2606:4700:0::1111]:53,1.1.1.1"]) == "[2606:4700::1111]:53,1.1.1.1"
    assert hosts.normal(["none"]) == "none"
    assert [hosts.normal([text]) for text in ("gateway", "a.org,gateway")] == ["gateway", "a.org"]


@pytest.mark.parametrize(
    "word",
    [
        "", "a.org,", "*", "*.", "a*.org", "*.*.org", "a.org:", "a.org:0", "a.org:70000", "a.org:x", "all,a.org", "off",
        "a b",
        "http://a.org", "a.org/x", "a..org", "-a.org", "a.org:80:90", "[a.org]", "[::1", "a\n.org", "a@b.org",
        "*.1.1.1.1", "10.0.0.1", "127.0.0.1", "127.1", "0x7f.1", "2130706433", "[::1]", "[::ffff:10.0.0.1]",
        "[fe80::1%eth0]", "169.254.169.254", "x" * 64 + ".org", ",".join(f"h{number}.org" for number in range(65)),
    ],
)  # fmt: skip
def test_invalid_networks_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        hosts.normal([word])


def test_settings_have_a_text_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "aiosd.toml").write_text(
        'net = ["a.org", "*.b.org:8443"]\n[[group]]\nname = "web"\nnet = "c.org, d.org"\n'
        '[[agent]]\nname = "own"\ncommand = "true"\nnet = ["e.org"]\n'
    )
    settings = config.load({}, Home(root=tmp_path), tmp_path / "aiosd.toml", {})
    assert settings.sandbox.net == "a.org,*.b.org:8443"
    assert settings.groups["web"].net == "c.org,d.org"
    assert settings.agents[0].sandbox.net == "e.org"


def test_which_grant_reaches_a_host() -> None:
    granted = hosts.grants("a.org,*.a.org,b.org:8443")
    assert [str(one) for one in granted] == ["a.org", "*.a.org", "b.org:8443"]
    reached = {
        (host, port): str(hosts.rule(granted, host, port) or "")
        for host in ("a.org", "x.y.a.org", "xa.org", "b.org", "a.org.evil.net")
        for port in (80, 443, 8443)
    }
    assert {key: rule for key, rule in reached.items() if rule} == {
        ("a.org", 80): "a.org", ("a.org", 443): "a.org",
        ("x.y.a.org", 80): "*.a.org", ("x.y.a.org", 443): "*.a.org", ("b.org", 8443): "b.org:8443",
    }  # fmt: skip


@given(NETS, NETS, NAMES, st.sampled_from([80, 443, 8443]))
def test_a_grant_that_covers_another_reaches_all_of_its_hosts(wide: str, narrow: str, host: str, port: int) -> None:
    def reaches(net: str) -> bool:
        return net == "all" or hosts.rule(hosts.grants(net), host, port) is not None

    if hosts.covers(wide, narrow):
        assert reaches(wide) or not reaches(narrow)
    assert hosts.covers(wide, wide)


def test_the_environment_leads_to_the_proxy() -> None:
    env = hosts.proxied({"PATH": "/bin", "HTTP_PROXY": "http://elsewhere", "No_Proxy": "*"})
    assert env["PATH"] == "/bin"
    assert {env[name] for name in ("http_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")} == {"http://127.0.0.1:3128"}
    assert env["NO_PROXY"] == env["no_proxy"] == "localhost,127.0.0.1"
    assert "No_Proxy" not in env


# ── boxes ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_single_hosts_need_the_cage() -> None:
    asked = wire.Sandbox(net="a.org")
    assert box.of_person(asked, SandboxSettings("cage"), "/w") == Box("cage", "a.org", "/w")
    for level in ("flat", "none"):
        with pytest.raises(OSError, match=r"--net a\.org needs --sandbox cage") as caught:
            box.of_person(asked, SandboxSettings(level), "/w")
        assert caught.value.errno == 95
    with pytest.raises(OSError, match="needs --sandbox cage"):
        box.of_person(wire.Sandbox(), SandboxSettings("flat", "a.org"), "/w")
    with pytest.raises(OSError, match="needs --sandbox cage"):
        box.of_child(asked, Box("flat", "all", "/w"))
    with pytest.raises(OSError, match="is no host"):
        box.with_hosts(wire.Sandbox(net="a b"))
    assert box.with_hosts(wire.Sandbox(net="A.org.")).net == "a.org"


def test_a_child_reaches_no_host_that_its_parent_does_not() -> None:
    parent = Box("cage", "a.org,*.b.org:8443", "/w")
    for net in ("", "none", "gateway", "a.org", "a.org:80", "x.b.org:8443", "*.c.b.org:8443,a.org"):
        assert box.of_child(wire.Sandbox(net=net), parent).net == (net or parent.net)
    for net in ("all", "b.org:8443", "x.b.org", "*.a.org", "a.org:8443", "a.org,c.org"):
        with pytest.raises(PermissionError, match="may not start one that reaches"):
            box.of_child(wire.Sandbox(net=net), parent)
    for net in ("a.org", "gateway"):
        with pytest.raises(PermissionError, match="without network"):
            box.of_child(wire.Sandbox(net=net), Box("cage", "none", "/w"))
    with pytest.raises(PermissionError, match="may not start one that reaches"):
        box.of_child(wire.Sandbox(net="a.org"), Box("cage", "gateway", "/w"))


def test_what_the_sdk_sends() -> None:
    assert wish("exec", "true", "/", {}, net=["A.org", "b.org, c.org"]).net == "a.org,b.org,c.org"
    assert wish("exec", "true", "/", {}, net="none").net == "none"
    assert wish("exec", "true", "/", {}).net == ""


def test_why_a_host_is_reached_or_not() -> None:
    one = Box("cage", "a.org", "/w")
    assert why.of_host("https://a.org/x?y", one).allowed
    denied = why.of_host("http://b.org:8080", one)
    assert (denied.allowed, denied.remedy) == (False, "--net b.org:8080")
    assert why.of_host("https://b.org", Box("flat", "none", "/w")).remedy == "--net all"
    assert why.of_host("https://b.org", Box("cage", "all", "/w")).allowed
    with pytest.raises(ValueError, match="which port"):
        why.of_host("ssh://a.org", one)


def test_a_url_in_place_of_a_host_is_named_as_such() -> None:
    with pytest.raises(ValueError, match=r"is a URL; what is named is its host: a\.org:8443$"):
        hosts.normal(["https://a.org:8443/x?y"])


def test_the_hint_for_a_program_that_ignores_the_proxy() -> None:
    from urllib.error import URLError

    unknown = __import__("socket").gaierror(-3, "Temporary failure")
    assert "the proxy of HTTPS_PROXY" in denial.words(unknown, Box("cage", "a.org", "/w"), ())
    assert "aios-run --net HOST" in denial.words(URLError(OSError(97, "x")), Box("cage", "none", "/w"), ())
    assert denial.words(unknown, Box("cage", "all", "/w"), ()) == ""
    assert denial.words(OSError(5, "x"), Box("cage", "none", "/w"), ()) == ""


# ── addresses ─────────────────────────────────────────────────────────────────────────────────────────────

PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1",
    "192.168.1.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1",
    "ff02::1", "2001:db8::1", "no address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public(address: str) -> None:
    assert addresses.why_not_public(address)


def test_an_address_that_is_public() -> None:
    for address in ("1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"):
        assert addresses.why_not_public(address) == ""


@given(st.integers(0, (1 << 32) - 1))
def test_an_address_within_ipv6_is_as_public_as_itself(number: int) -> None:
    plain = ipaddress.IPv4Address(number)
    public = addresses.why_not_public(str(plain)) == ""
    assert not public or (plain.is_global and not plain.is_multicast)
    for form in (f"::ffff:{plain}", f"64:ff9b::{plain}"):
        assert (addresses.why_not_public(form) == "") == public


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tunnel() -> None:
    assert request.parse(b"CONNECT A.org:443 HTTP/1.1\r\nHost: b.org\r\n\r\n") == ProxyRequest("a.org", 443)
    assert request.parse(b"CONNECT [2606:4700::1111]:443 HTTP/1.1\r\n\r\n") == ProxyRequest("2606:4700::1111", 443)


def test_a_plain_request_is_rewritten() -> None:
    found = request.parse(
        b"POST http://A.org:8080/x?y#z HTTP/1.1\r\nHost: b.org\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n"
        b"Proxy-Authorization: secret\r\nContent-Length: 12\r\naccept:  */* \r\n\r\n"
    )
    assert found == ProxyRequest(
        "a.org",
        8080,
        b"POST /x?y HTTP/1.1\r\nHost: a.org:8080\r\ncontent-length: 12\r\naccept: */*\r\nConnection: close\r\n\r\n",
        12,
    )
    assert request.parse(b"GET http://a.org HTTP/1.0\r\n\r\n").head.startswith(b"GET / HTTP/1.0\r\nHost: a.org\r\n")
    assert request.parse(b"GET http://a.org?q HTTP/1.1\r\n\r\n").head.startswith(b"GET /?q HTTP/1.1\r\n")
    chunked = request.parse(b"PUT http://a.org/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert chunked.body == request.CHUNKED


@pytest.mark.parametrize(
    "head",
    [
        b"", b"GET", b"GET / HTTP/1.1", b"GET http://a.org/ HTTP/2.0", b"GET https://a.org/ HTTP/1.1",
        b"GET ftp://a.org/ HTTP/1.1", b"CONNECT a.org HTTP/1.1", b"CONNECT a.org:x HTTP/1.1",
        b"G\0T http://a.org/ HTTP/1.1",
        b"GET http://u:p@a.org/ HTTP/1.1", b"GET http:///x HTTP/1.1", b"GET  http://a.org/ HTTP/1.1",
        b"GET http://a.org/\xff HTTP/1.1", b"CONNECT a.org:443:80 HTTP/1.1",
        b"POST http://a.org/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2",
        b"POST http://a.org/ HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked",
        b"POST http://a.org/ HTTP/1.1\r\nTransfer-Encoding: gzip, chunked",
        b"POST http://a.org/ HTTP/1.0\r\nTransfer-Encoding: chunked",
        b"POST http://a.org/ HTTP/1.1\r\nContent-Length: -1", b"POST http://a.org/ HTTP/1.1\r\nContent-Length: 1e3",
        b"GET http://a.org/ HTTP/1.1\r\n folded: x", b"GET http://a.org/ HTTP/1.1\r\nx : y",
        b"GET http://a.org/ HTTP/1.1\r\nx: a\nb: c", b"GET http://a.org/ HTTP/1.1\r\nnone",
        b"GET http://a.org/ HTTP/1.1\r\n" + b"x: y\r\n" * 257,
    ],
)  # fmt: skip
def test_invalid_requests_are_refused(head: bytes) -> None:
    with pytest.raises(Bad):
        request.parse(head + b"\r\n\r\n")


PIECES = st.sampled_from(
    [b"GET ", b"CONNECT ", b"http://", b"a.org", b":", b"443", b" HTTP/1.1", b"\r\n", b"\n", b"Host", b": ", b"chunked",
     b"Content-Length", b"Transfer-Encoding", b"/", b"@", b"[", b"]", b"::1", b"%", b"\0", b"\xff", b"#", b"?", b"12"]
)  # fmt: skip


@given(st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=20).map(b"".join)))
def test_any_bytes_are_a_request_or_refused(head: bytes) -> None:
    try:
        found = request.parse(head + b"\r\n\r\n")
    except Bad:
        return
    assert hosts.address(f"[{found.host}]" if ":" in found.host else found.host)[0] == found.host
    assert 1 <= found.port <= 65535
    if found.head:
        first, *rest = found.head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        assert re.fullmatch(rb"[^ ]+ /[^ ]* HTTP/1\.[01]", first)
        assert [line for line in rest if line.lower().startswith(b"host:")] == rest[:1]
        assert b"\n" not in b"".join([first, *rest])


def test_lengths_of_chunks() -> None:
    assert [request.chunk(line) for line in (b"0", b"1f", b"A ; x=y")] == [0, 31, 10]
    for line in (b"", b"-1", b"0x1", b"+1", b" 1", b"1" * 16, b"1\n"):
        with pytest.raises(Bad):
            request.chunk(line)


# ── dialling ──────────────────────────────────────────────────────────────────────────────────────────────


def dial(host: str, port: int) -> None:
    async def run() -> None:
        sock = await Dialer().dial(host, port, asyncio.Semaphore(1))
        sock.close()

    asyncio.run(run())


def test_a_name_of_this_machine_is_refused() -> None:
    with pytest.raises(Private, match="an address of this machine"):
        dial("localhost", 80)
    with pytest.raises(Unreachable, match="is not known"):
        dial("nonesuch.invalid", 80)


def test_the_proxys_processor_time_is_divided_by_work() -> None:
    """Time in which it serves no agent is charged to none, and nothing is charged twice."""
    looks: list[Callable[[], None]] = []
    charged: list[tuple[int, int]] = []
    used = 5.0
    shares = Shares(lambda seconds, look: looks.append(look), lambda *one: charged.append(one), lambda: used)
    for begin in (5.0, 9.0):
        used = begin
        shares.connected(7)
        shares.read(8, 0)
        shares.read(8, 14 * PIECE)
        shares.connected(8)
        used = begin + 0.03
        (look,) = looks
        looks.clear()
        look()
        assert charged == [(7, 10_000), (8, 20_000)]
        charged.clear()
    assert looks == []
