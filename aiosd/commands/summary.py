"""Makes the text of `aiosd status`: a few lines, or with -v all figures that the system reports."""

from __future__ import annotations

from typing import Any

from aiosd.commands import figures
from aiosd.commands.edge import escaped
from aiosd.units import format_duration, format_size

LABEL = 16  # width of the column of names at most; a longer name has a line of its own


def brief(found: dict[str, Any], machine: str = "") -> list[str]:
    """The most important figures. One that the system does not report is left out."""
    rows = {"home": str(found.get("home", "")), "policy": _policy(found), "agents": _agents(found)}
    rows["gateway"] = _gateway(found)
    rows |= {f"model {model.get('name', '?')}": _model_in_a_line(model) for model in found.get("models", [])}
    rows |= {f"route {route.get('name', '?')}": _route_in_a_line(route) for route in found.get("routes", [])}
    rows["notes"] = _notes(found)
    cores = {model["pid"] for model in found.get("models", []) if "pid" in model}  # they have lines of their own
    services = [service for service in found.get("services", []) if service.get("pid") not in cores]
    others = [service for service in services if service.get("state") not in (None, "ready")]
    rows |= {str(service.get("name", "?")): str(service["state"]) for service in others}
    rows |= {str(service["name"]): text for service in found.get("services", []) if (text := _errors(service))}
    rows["templates"] = ", ".join(_template(one) for one in found.get("templates", []))
    rows["MCP servers"] = _servers(found)
    rows |= {f"agent {name}": text for name, text in found.get("agent_problems", {}).items()}
    rows["sandbox"] = _sandbox(found.get("sandbox") or {})
    rows["access"] = _access(found.get("access") or {})
    rows["machine"] = machine
    shown = {escaped(name): escaped(text) for name, text in rows.items() if text}
    width = max((len(name) for name in shown if len(name) <= LABEL), default=0)
    lines = [_head(found)]
    for name, text in shown.items():
        first, *more = figures.wrapped(text, figures.LINE - width - 4)
        head = [f"  {name:{width}}  {first}"] if len(name) <= width else [f"  {name}", " " * (width + 4) + first]
        lines += [*head, *(" " * (width + 4) + line for line in more)]
    return lines + _checked(found.get("check"))


def _gateway(found: dict[str, Any]) -> str:
    """Its address, and where it is, too: the ports alone, where they are of the same host."""
    url = found.get("gateway", "")
    if not url:
        return str(found.get("gateway_why", ""))
    host = url[: url.rindex(":") + 1]
    more = [one.removeprefix(host).removeprefix("http://") for one in found.get("gateway_more", [])]
    return f"{url}/v1" + (f", also at {', '.join(more)}" if more else "")


def _head(found: dict[str, Any]) -> str:
    parts = [f"aiosd {found.get('version', '')}", str(found.get("state", ""))]
    if "uptime_s" in found:
        parts.append(f"up {format_duration(found['uptime_s'])}")
    parts.append(f"pid {found.get('pid', '?')}")
    return ", ".join(part for part in parts if part)


def _policy(found: dict[str, Any]) -> str:
    quantum = found.get("quantum") or {}
    if "tokens" not in quantum:
        return str(found.get("policy", ""))
    return f"{found.get('policy', '')} ({quantum['tokens']} tokens or {quantum.get('seconds', 0):g} s)"


def _sandbox(found: dict[str, Any]) -> str:
    """How agents are confined, and why a stronger level is not possible."""
    if not found:
        return ""
    default = str(found.get("default", ""))
    parts = [f"{default} (strict)" if found.get("strict") else default]
    parts += [f"{name} {level}" for name, level in found.get("groups", {}).items()]
    if found.get("possible") not in (None, default) and not found.get("why_no_more"):
        parts.append(f"{found['possible']} is possible")
    if found.get("why_no_more"):
        parts.append(f"no more than {found.get('possible')} is possible: {found['why_no_more']}")
    return ", ".join(parts)


def _access(found: dict[str, Any]) -> str:
    """The rules, and the asks that wait for a person."""
    rules = found.get("rules")
    parts = [f"{rules} rule{'s' * (rules != 1)}"] if rules else []
    if found.get("always"):
        parts.append(f"{found['always']} allowed for all times")
    if found.get("asks"):
        parts.append(f"{found['asks']} asked for now (aios-approve)")
    return ", ".join(parts)


def _agents(found: dict[str, Any]) -> str:
    states = found.get("agents", {})
    text = str(sum(states.values()))
    if states:
        text += f" ({', '.join(f'{count} {stat}' for stat, count in sorted(states.items()))})"
    if "max_agents" in found:
        text += f", at most {found['max_agents']} at once (limit on open files)"
    return text


def _model_in_a_line(model: dict[str, Any]) -> str:
    info, stats = model.get("info") or {}, model.get("stats") or {}
    parts = [str(model.get("state", "?"))]
    if model.get("state") != "ready" and model.get("last_death"):
        parts.append(str(model["last_death"]))
    if model.get("default"):
        parts.append("the default")
    slots = stats.get("slots")
    if isinstance(slots, dict) and "total" in slots:
        what = f"requests at a time, {info['url']}" if info.get("url") else f"slots of {info.get('n_ctx', '?')} tokens"
        parts.append(f"{slots.get('used', 0)} of {slots['total']} {what}")
        if stats.get("circuit") not in (None, "closed"):
            parts.append(f"it fails: {stats.get('last_failure', '?')}")
    if model.get("open_calls"):
        parts.append(f"{model['open_calls']} open call{'s' * (model['open_calls'] != 1)}")
    if stats.get("tokens_per_s"):
        parts.append(f"{stats['tokens_per_s']:,.1f} tokens/s")
    return ", ".join(parts)


def _template(one: dict[str, Any]) -> str:
    """`openai (Python 3.11.7; 612 modules; 5 agents)`: without commas, at which lines are broken."""
    name = str(one.get("name", "?")).partition(":")[2]
    if one.get("state") != "ready":
        return f"{name} ({one.get('state', '?')})"
    return f"{name} (Python {one.get('version')}; {one.get('loaded')} modules; {one.get('agents')} forked)"


def _servers(found: dict[str, Any]) -> str:
    return ", ".join(f"{one.get('name', '?')} (pid {one.get('pid', '?')})" for one in found.get("mcp_servers", []))


def _route_in_a_line(route: dict[str, Any]) -> str:
    return ", ".join(map(_model_of_route, route.get("models", [])))


def _model_of_route(model: dict[str, Any]) -> str:
    text = f"{model.get('name', '?')} ({model.get('calls', 0)} calls"
    if model.get("passed_over"):
        text += f"; passed over {model['passed_over']} times: {model.get('why', '?')}"
    return f"{text})" + (" now in trouble" if model.get("trouble") else "")


def _errors(service: dict[str, Any]) -> str:
    """Errors of a service that is ready."""
    errors = (service.get("stats") or {}).get("errors") or {}
    first = next(iter(errors.items()), None)
    if first is None:
        return ""
    more = f" (and {len(errors) - 1} more: aiosd status -v)" if len(errors) > 1 else ""
    return f"{service.get('state', '?')}, but {first[0]}: {first[1]}{more}"


def _notes(found: dict[str, Any]) -> str:
    stats = next((one.get("stats") or {} for one in found.get("services", []) if one.get("kind") == "store"), {})
    parts = [f"search {stats['search']}"] if "search" in stats else []
    if stats.get("pending"):
        parts.append(f"{stats['pending']:,} texts wait for their vectors")
    if "hits" in stats:
        parts.append(
            f"{stats['hits']:,} hits, {stats.get('faults', 0):,} faults, {stats.get('evictions', 0):,} evictions"
        )
        parts.append(f"{format_size(stats.get('bytes', 0) + stats.get('index_bytes', 0))} in memory")
    return ", ".join(parts)


def _checked(problems: list[str] | None) -> list[str]:
    if problems is None:
        return []
    return [f"check: {escaped(problem)}" for problem in problems] or ["check: all books balance"]


# ── all of it ─────────────────────────────────────────────────────────────────────────────────────────────


def full(found: dict[str, Any], machine: str = "") -> list[str]:
    """All figures. One that is not known here is shown under its own name."""
    rest = {name: value for name, value in found.items() if name not in _IN_OTHER_WORDS}
    lines = [_head(found)]
    models, services = found.get("models", []), found.get("services", [])
    cores = {str(model.get("pid")) for model in models}
    rows: dict[str, Any] = {name: rest.pop(name) for name in ("home", "logs", "log") if name in rest}
    rows |= {"policy": _policy(found), "agents now": _agents(found), "machine": machine, "gateway": _gateway(found)}
    rows |= {f"route {route.get('name', '?')}": _route_in_a_line(route) for route in found.get("routes", [])}
    rows |= {"mcp_servers": _servers(found)} | _of_sandbox(found.get("sandbox") or {}) | rest
    lines += figures.rows(rows)
    for model in models:
        lines += _full_model(dict(model))
    for service in services:
        if str(service.get("pid")) not in cores:
            lines += _full_service(dict(service))
    for template in found.get("templates", []):
        of_template = {key: value for key, value in template.items() if key != "name"}
        lines += [str(template.get("name", "?")), *figures.rows(of_template)]
    return lines + _checked(found.get("check"))


#: What `full` shows in a form of its own.
_IN_OTHER_WORDS = {
    "version", "state", "uptime_s", "pid", "agents", "max_agents", "policy", "quantum", "gateway", "gateway_more",
    "gateway_why", "sandbox", "routes", "mcp_servers", "models", "services", "templates", "check",
}  # fmt: skip


def _of_sandbox(found: dict[str, Any]) -> dict[str, Any]:
    """How agents are confined, and what all of them may use, in a row each."""
    rows: dict[str, Any] = {"sandbox": _sandbox(found), "what it leaves open": found.get("left_open")}
    return rows | {f"agents' {name}": paths for name, paths in found.get("every_agent", {}).items()}


def _full_service(service: dict[str, Any]) -> list[str]:
    lines = [f"service {service.pop('name', '?')}, {service.pop('state', '?')}, pid {service.pop('pid', '?')}"]
    service.pop("kind", None)
    rows = {**(service.pop("stats", None) or {}), **{name: value for name, value in service.items() if value}}
    return [*lines, *figures.rows(rows)]


def _full_model(model: dict[str, Any]) -> list[str]:
    info, stats = dict(model.pop("info", None) or {}), dict(model.pop("stats", None) or {})
    default = " (default)" if model.pop("default", False) else ""
    lines = [f"model {model.pop('name', '?')}{default}, {model.pop('state', '?')}, pid {model.pop('pid', '?')}"]
    rows = {"path": model.pop("path", info.get("path", ""))}
    info.pop("route", None)  # a started model has none
    if info.get("url"):
        rows = {"url": info["url"], "runs": f"{info.get('n_slots', '?')} requests at a time"}
        info = {}
    elif info:
        rows["runs"] = f"{info.pop('n_slots', '?')} slots of {info.pop('n_ctx', '?')} tokens"
        for known in ("name", "path", "default"):
            info.pop(known, None)
    tiers = stats.pop("tiers", None) or {}
    where = {"slot": "in slots", "ram": "in memory", "disk": "on disk"}
    rows |= model | info | stats | {f"contexts {where.get(name, name)}": tier for name, tier in tiers.items()}
    return [*lines, *figures.rows(rows)]
