"""What every address of the web service says to a browser, and what nobody gets through it: scripts, other hosts, other
headers, sessions from a shared cache.

The addresses are read from the application, so that a new page is looked at without a word here, but for what goes into
its path (VALUES) and what its people may write (PLANTS).
"""

import csv
import io
import itertools
import json
import re
import socket
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from kantha.coordinator.allowlist import Person
from kantha.coordinator.service import Coordinator
from kantha.coordinator.status import VolunteerStatus
from kantha.spec import ScheduleState
from kantha.swarm.membership import Membership
from kantha.swarm.reports import RoundReport
from kantha.web.app import build_app
from kantha.web.site import load_assets

ADDRESS = "http://127.0.0.1:8600"
HERE = ("127.0.0.1", 1234)
MODERATOR = "Mitu"
LANGUAGES = ("en", "bn")

# What to put into paths, by the parameter's name and the path before it, if that matters.
VALUES = {
    "file": "page.css",
    "round_number": "0",
    "name": "model.safetensors",
    "slug": "name",
    "form": "csv",
    "deed": "pause",
}
BADGES = ("samples", "volunteers", "loss", "round")

EVIL = "zz-evil"  # a tag and an attribute that no page has
PAYLOADS = [
    f"<{EVIL} onload=alert(1)>",
    f"\"'><{EVIL}><script>alert(1)</script>",
    f"</title></script><{EVIL}>",
    f"\" {EVIL}=1 onmouseover=alert(1) x='",
    f"' {EVIL}=1 onfocus=alert(1) autofocus '",
    "{{ 7 * 7 }}{% include 'base.html' %}${7*7}",
    "%(num)s %s %n %(name)d 100%",
    "javascript:alert(1)//",
    f"]]><{EVIL}/>&#60;{EVIL}&#62;",
    "=HYPERLINK(0)",
]
LINK = f'https://evil.example/"{EVIL}=1><{EVIL}>'  # announcements make links of such


# ---- what people may write, and where it is kept. A part that keeps more adds a function to PLANTS.


def plant_people(coordinator: Coordinator, texts: list[str]) -> None:
    """Who were here, have done something, and were banned for it."""
    for number, text in enumerate(texts, 1):
        peer = f"peer {number}"
        coordinator.allowlist.decide([text], "ban", text, text)
        membership = Membership(
            serial=f"{number:016x}",
            run=coordinator.run.spec.fingerprint,
            username=text[:40],
            peer_id=peer,
            service="local",
            roles=("trainer",),
            issued=0,
            expires=2**31,
        )
        coordinator.ledger.add_member(membership, coordinator.allowlist.standing(text).number)
        coordinator.ledger.set_device(peer, text)
        coordinator.ledger.mark_failed(number, text)
        done = RoundReport(
            round=number,
            lineage="0f",
            samples=10,
            seconds=5.0,
            waited=0.0,
            mlm_loss_sum=10.0,
            sop_loss_sum=5.0,
            peers=1,
        )
        coordinator.ledger.add_rounds(peer, [done])


def plant_volunteers(coordinator: Coordinator, texts: list[str]) -> None:
    """What peers say of themselves, now."""
    here = [
        VolunteerStatus(
            name=text,
            peer_id=text,
            state=text,
            round=1,
            samples_in_round=1,
            samples=1,
            samples_per_second=1.0,
            loss=1.0,
            device=text,
            seconds_since_seen=1.0,
        )
        for text in texts
    ]
    told = coordinator.status().model_copy(update={"name": texts[0], "goal": texts[1], "volunteers": here})
    coordinator.status = lambda: told  # type: ignore[method-assign]


@dataclass
class _Poll:
    slug: str
    title: str
    opens: float = 1.7e9
    closes: float = 1.8e9


def plant_milestones(coordinator: Coordinator, texts: list[str]) -> None:
    """The titles of polls."""
    coordinator.milestones._look_after = 0.0
    polls = [_Poll(f"poll-{number}", text) for number, text in enumerate(texts)]
    coordinator.milestones._polls = lambda: polls
    coordinator.milestones.look(ScheduleState())


def plant_polls(coordinator: Coordinator, texts: list[str]) -> None:
    """What members propose, and what moderators ask, hide and say of it."""
    now = time.time()
    coordinator.polls.make("name", texts[0], texts[1], now - 100, now + 100_000, texts[2])
    for number, text in enumerate(texts):
        coordinator.allowlist.sign_in(Person(f"proposer {number}", "", "local", ()))
        by = coordinator.allowlist.standing(f"proposer {number}").number
        entry = coordinator.polls.propose("name", text, by)
        if number % 3 == 0:
            coordinator.polls.hide("name", entry, text, text)


def plant_announcements(coordinator: Coordinator, texts: list[str]) -> None:
    """As many as are shown at once, and the reason of a pause."""
    for text in (texts[0], texts[1], LINK):
        coordinator.bulletin.announce(text, 24, text)
    coordinator.bulletin.pause(texts[2], texts[2])


PLANTS: list[Callable[[Coordinator, list[str]], None]] = [
    plant_people,
    plant_milestones,
    plant_polls,
    plant_announcements,
    plant_volunteers,
]


# ---- addresses and browsers


def addresses(app: FastAPI) -> list[tuple[str, frozenset[str]]]:
    """All of the application, with the methods that they answer."""
    found: dict[str, frozenset[str]] = {}
    for route in iter_route_contexts(app.routes):
        if route.path.startswith("/badge/"):
            paths = [f"/badge/{name}.svg" for name in BADGES]
        elif route.path.startswith("/static/"):
            paths = [f"/static/{load_assets()[0]['style']}"]
        else:
            paths = [re.sub(r"\{(\w+)[^}]*\}", lambda match: VALUES.get(match[1], "1"), route.path)]
        for path in paths:
            found[path] = found.get(path, frozenset()) | frozenset(route.methods or ())
    assert {"/", "/desk", "/me", "/metrics", "/api/v1/status", "/openapi.json"} <= found.keys()
    return sorted(found.items())


def pages(app: FastAPI) -> list[str]:
    return [path for path, methods in addresses(app) if "GET" in methods]


@pytest.fixture
def app(web_app: FastAPI, web_coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> Iterator[FastAPI]:
    # exports are counted, and here they are asked for again and again
    monkeypatch.setattr("kantha.coordinator.limiter.Limiter.hit", lambda *_: None)
    web_app.state.site._kept.clear()
    yield web_app
    vars(web_coordinator).pop("status", None)
    web_app.state.site._kept.clear()


def browser(app: FastAPI) -> TestClient:
    return TestClient(app, base_url=ADDRESS, client=HERE, follow_redirects=False)


@pytest.fixture
def nobody(app: FastAPI) -> TestClient:
    return browser(app)


@pytest.fixture
def moderator(app: FastAPI, web_coordinator: Coordinator) -> TestClient:
    client = browser(app)
    sign_in(client, MODERATOR)
    web_coordinator.allowlist.set_moderator(MODERATOR, True, "organizer")
    return client


def sign_in(client: TestClient, name: str) -> None:
    token = re.search(r'name="form" value="([^"]+)"', client.get("/sign-in").text)
    assert token is not None
    answer = client.post("/sign-in", data={"form": token[1], "name": name}, headers={"Origin": ADDRESS})
    assert answer.status_code == 303, answer.text


class Tags(HTMLParser):
    """All tags with their attributes, and the texts of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def problems_of(answer: Any) -> list[str]:
    """What a script could come in by."""
    kind = answer.headers.get("content-type", "").partition(";")[0]
    found = []
    if kind == "text/html":
        seen = Tags(answer.text)
        for tag, attributes in seen.tags:
            if EVIL in (tag, *attributes):
                found.append(f"<{tag} {attributes}>")
            found += [f"<{tag} {name}>" for name in attributes if name.startswith("on") or name in ("style", "srcdoc")]
            for name in ("href", "src", "action", "formaction"):
                scheme = urlsplit((attributes.get(name) or "").strip()).scheme
                if scheme not in ("", "http", "https"):
                    found.append(f"<{tag} {name}={attributes[name]}>")
            if tag == "script" and "src" not in attributes and attributes.get("type") != "application/json":
                found.append("a script in the page")
        for script in seen.scripts:
            json.loads(script)
    elif kind in ("image/svg+xml", "application/atom+xml"):
        for element in ET.fromstring(answer.content).iter():
            if element.tag.rpartition("}")[2] in (EVIL, "script") or EVIL in element.attrib:
                found.append(f"<{element.tag} {element.attrib}>")
    elif kind == "text/csv":
        for row in csv.reader(io.StringIO(answer.text)):
            found += [cell for cell in row if cell.startswith(("=", "+", "@"))]
    elif kind == "application/json" or kind.startswith(("text/plain", "text/css")):
        pass  # nothing that a browser would run, and nosniff says so: see below
    elif answer.status_code < 300:
        found.append(f"an unknown type: {kind}")
    return found


# ---- headers


def weaknesses_of(answer: Any, is_signed_in: bool) -> Iterator[str]:
    headers = answer.headers
    policy = {
        name: set(sources.split())
        for name, _, sources in (part.strip().partition(" ") for part in headers["content-security-policy"].split(";"))
    }
    if policy.get("default-src") not in ({"'self'"}, {"'none'"}):
        yield f"default-src {policy.get('default-src')}"
    for name in ("base-uri", "frame-ancestors"):
        if policy.get(name) != {"'none'"}:
            yield f"{name} {policy.get(name)}"
    if not policy.get("form-action", set()) <= {"'self'", "'none'"} or "form-action" not in policy:
        yield f"form-action {policy.get('form-action')}"
    for name, sources in policy.items():
        allowed = {"'self'", "'none'"} | ({"'unsafe-inline'"} if name == "style-src" else set())
        allowed |= {"data:"} if name == "img-src" else set()
        if not sources <= allowed:
            yield f"{name} {sources}"
    if headers.get("x-content-type-options") != "nosniff":
        yield "no nosniff"
    if headers.get("referrer-policy") not in ("no-referrer", "same-origin"):
        yield "a referrer"
    if "access-control-allow-origin" in headers:
        yield "other sites may read it"
    kept = headers.get("cache-control", "")
    if "no-store" not in kept:
        if "public" not in kept:
            yield f"Cache-Control: {kept}"
        if headers.get("content-type", "").startswith("text/html"):
            yield "a page that is kept"
        if "kantha=" in headers.get("set-cookie", ""):
            yield "a session that is kept"
        if is_signed_in and MODERATOR.encode() in answer.content:
            yield "a person's name that is kept"


def test_every_address_says_what_a_browser_may_do_with_it(
    app: FastAPI, nobody: TestClient, moderator: TestClient
) -> None:
    weak = []
    for (path, methods), client in itertools.product(addresses(app), (nobody, moderator)):
        asked = [("GET", path), ("HEAD", path)] if "GET" in methods else []
        asked += [("POST", path), ("OPTIONS", path), ("DELETE", path), ("GET", f"{path}/nowhere")]
        for method, where in asked:
            answer = client.request(method, where)
            assert answer.status_code < 500, (method, where)
            weak += [f"{method} {where}: {what}" for what in weaknesses_of(answer, client is moderator)]
    assert weak == []


def test_what_may_be_kept_by_all_is_the_same_for_all(app: FastAPI, nobody: TestClient, moderator: TestClient) -> None:
    kept = []
    for path in pages(app):
        one, other = nobody.get(path), moderator.get(path)
        if "public" in one.headers["cache-control"] + other.headers["cache-control"]:
            kept.append(path)
            assert one.content == other.content, path
            assert "set-cookie" not in one.headers, path
            assert "set-cookie" not in other.headers, path
    assert {"/badge/loss.svg", "/feed.atom"} < set(kept)


def test_what_is_turned_away_has_the_same_headers(app: FastAPI, nobody: TestClient) -> None:
    for headers, status in [({"Host": "evil.example"}, 400), ({"Host": ""}, 400)]:
        answer = nobody.get("/", headers=headers)
        assert answer.status_code == status
        assert list(weaknesses_of(answer, False)) == []
    elsewhere = TestClient(app, base_url=ADDRESS, client=("203.0.113.5", 1))
    assert list(weaknesses_of(elsewhere.post("/api/v1/departures", json={}), False)) == []


# ---- other hosts

HOSTILE_WAYS = [
    "https://evil.example",
    "//evil.example",
    "///evil.example",
    "/\\evil.example",
    "\\\\evil.example",
    "https:evil.example",
    "http:///evil.example",
    "/%2f%2fevil.example",
    ".evil.example",
    "@evil.example",
    "me\r\nLocation: https://evil.example",
    "javascript:alert(1)",
    "desk#//evil.example",
    "me?next=//evil.example",
]
PARAMETERS = ("to", "next", "url", "redirect", "return", "lang", "code", "state", "q")


def rotations(texts: list[str]) -> list[dict[str, str]]:
    """Queries, in each of which the parameters have different texts, and each text is somewhere in one of them."""
    return [
        dict(zip(PARAMETERS, itertools.islice(itertools.cycle(texts), start, None), strict=False))
        for start in range(0, len(texts), len(PARAMETERS))
    ]


def leads_away(answer: Any) -> bool:
    """Whether a browser would leave the run's address."""
    location = answer.headers.get("location")
    if location is None:
        return False
    plain = location.replace("\\", "/")  # as browsers read it
    if plain.startswith(f"{ADDRESS}/"):
        return False
    return bool(urlsplit(plain).scheme or plain.startswith("//") or re.search(r"[\x00-\x20]", location))


def test_no_address_leads_to_another_host(app: FastAPI, nobody: TestClient, moderator: TestClient) -> None:
    for path, client, some in itertools.product(pages(app), (nobody, moderator), rotations(HOSTILE_WAYS)):
        answer = client.get(path, params=some)
        assert answer.status_code < 500, path
        assert not leads_away(answer), (path, answer.headers["location"])
        if answer.headers.get("content-type", "").startswith("text/html"):
            links = [attributes.get("href") or "" for tag, attributes in Tags(answer.text).tags if tag == "a"]
            assert "evil.example" not in {urlsplit(link.replace("\\", "/")).hostname for link in links}, path


@pytest.mark.parametrize("way", HOSTILE_WAYS)
def test_sign_in_leads_back_to_this_host(app: FastAPI, web_coordinator: Coordinator, way: str) -> None:
    client = browser(app)
    page = client.get("/sign-in", params={"to": way})
    token = re.search(r'name="form" value="([^"]+)"', page.text)
    assert token is not None
    answer = client.post("/sign-in", data={"form": token[1], "name": "Asha", "to": way}, headers={"Origin": ADDRESS})
    assert answer.status_code == 303
    assert not leads_away(answer)


FORGED: list[dict[str, str]] = [
    {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "gopher", "X-Forwarded-Prefix": "/evil.example"},
    {"Forwarded": "for=1.2.3.4;host=evil.example;proto=https"},
    {"X-Original-URL": "//evil.example/desk", "X-Rewrite-URL": "/desk", "X-HTTP-Method-Override": "DELETE"},
    {"X-Real-IP": "evil.example", "X-Forwarded-For": "evil.example", "Origin": "https://evil.example"},
    {"Referer": "https://evil.example/", "Accept-Language": "evil.example", "Accept": "evil.example/*; version=zz"},
    {"Cookie": "lang=evil.example; kantha=evil.example"},
]


@pytest.mark.parametrize("headers", FORGED, ids=lambda headers: next(iter(headers)))
def test_what_a_proxy_is_said_to_say_is_not_believed(app: FastAPI, nobody: TestClient, headers: dict[str, str]) -> None:
    for path in pages(app):
        answer = nobody.get(path, headers=headers)
        assert answer.status_code == nobody.get(path).status_code, path
        assert "evil.example" not in answer.text + str(answer.headers), path


def test_where_any_host_may_look_no_link_goes_to_the_host_that_was_asked_for(
    app: FastAPI, web_coordinator: Coordinator
) -> None:
    everywhere = build_app(web_coordinator, any_host=True)
    client = TestClient(everywhere, base_url="http://evil.example", client=HERE, follow_redirects=False)
    for path in pages(everywhere):
        answer = client.get(path)
        assert answer.status_code < 500
        assert "evil.example" not in answer.text + str(answer.headers), path


# ---- other headers

BREAKS = ["%0d%0aX-Evil:%201", "%0aX-Evil:1", "%0d%0a%0d%0a<p>", "%00", "%E5%98%8A%E5%98%8DX-Evil:1", "%c4%8d%c4%8a"]


@pytest.mark.parametrize("text", BREAKS)
def test_no_address_makes_another_header(app: FastAPI, nobody: TestClient, text: str) -> None:
    for path in pages(app):
        query = "&".join(f"{name}=me{text}" for name in PARAMETERS)
        for where in (f"{path}?{query}", f"{path}{text}", f"/{text}{path}"):
            answer = nobody.get(where)
            assert answer.status_code < 500, where
            assert "x-evil" not in answer.headers, where
            assert not any(re.search(r"[\r\n\0]", value) for value in answer.headers.values()), where


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        "GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        "GET //evil.example/me HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        "GET /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Evil: 1\n X-Evil: 2\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: evil.example@127.0.0.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n",
    ],
)
def test_requests_that_servers_may_read_in_two_ways_are_refused_or_harmless(coordinator_url: str, head: str) -> None:
    where = urlsplit(coordinator_url)
    head = head.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
    with socket.create_connection((str(where.hostname), int(where.port or 0)), timeout=10) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    status = int(answer.split(b" ")[1])
    assert status < 500
    assert b"evil.example" not in answer.partition(b"\r\n\r\n")[0]
    assert status >= 400 or b"evil.example" not in answer


# ---- scripts


def test_what_people_write_is_text_on_every_page(
    app: FastAPI, web_coordinator: Coordinator, nobody: TestClient, moderator: TestClient
) -> None:
    for plant in PLANTS:
        plant(web_coordinator, PAYLOADS)
    author = browser(app)
    sign_in(author, PAYLOADS[0])
    found, shown = [], {}
    for path, client, language in itertools.product(pages(app), (nobody, author, moderator), LANGUAGES):
        answer = client.get(path, params={"lang": language})
        assert answer.status_code < 500, path
        found += [f"{path} ({language}): {problem}" for problem in problems_of(answer)]
        shown[path] = answer.text.count("&lt;zz-evil") + answer.text.count("<zz-evil")
    assert found == []
    # else the test would look at nothing
    assert {"/", "/desk", "/name", "/milestones", "/feed.atom", "/api/v1/export/volunteers.csv"} <= {
        path for path, count in shown.items() if count
    }


def test_who_writes_is_shown_only_text_too(app: FastAPI, web_coordinator: Coordinator) -> None:
    for text in PAYLOADS:
        author = browser(app)
        sign_in(author, text[:40])
        for path in ("/", "/me", "/pair", "/desk"):
            assert problems_of(author.get(path)) == [], (path, text)


def test_what_an_address_says_is_not_run(app: FastAPI, nobody: TestClient, moderator: TestClient) -> None:
    found = []
    for path in pages(app):
        for client, some in itertools.product((nobody, moderator), rotations(PAYLOADS)):
            found += [f"{path}: {problem}" for problem in problems_of(client.get(path, params=some))]
        for text in PAYLOADS:
            where = f"{path}/{quote(text, safe='')}"
            answer = nobody.get(where)
            assert answer.status_code < 500, where
            found += [f"{where}: {problem}" for problem in problems_of(answer)]
    assert found == []
