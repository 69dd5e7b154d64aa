"""The pages about persons: sign-in at a local hub, pairing, one's own page, the desk; and who must not use them."""

import base64
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from canaries import CLIENT_SECRET
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from hub_accounts import CLIENT_ID, Accounts, serving
from limits import RateLimitItemPerMinute

from kantha.api import Admission as Admitted
from kantha.api import Waiting
from kantha.coordinator.admission import PAIRING_SECONDS, Admission, SignIn
from kantha.coordinator.allowlist import Allowlist, State
from kantha.coordinator.bulletin import Bulletin
from kantha.coordinator.database import Database
from kantha.coordinator.leaderboard import Leaderboard
from kantha.coordinator.ledger import Ledger
from kantha.coordinator.polls import Polls
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.service import Coordinator
from kantha.coordinator.status import RunStatus
from kantha.errors import StorageError
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import MembershipRequest
from kantha.web.app import build_app

ADDRESS = "http://127.0.0.1:8600"
CALLBACK = f"{ADDRESS}/sign-in/callback"
HOSTILE = "<script>alert(1)</script>"


class Served:
    """All of a coordinator that its pages ask, without a swarm."""

    sign_in: SignIn = "huggingface"

    def __init__(self, run: RunDirectory, address: str = ADDRESS) -> None:
        self.run, self.address = run, address
        self.begin_anew(run.ledger)

    def begin_anew(self, ledger: Path) -> None:
        """With a database in which nobody is."""
        self.later = 0.0  # seconds that its clock is ahead
        database = Database(ledger)
        self.ledger = Ledger(database)
        self.allowlist = Allowlist(database)
        self.leaderboard = Leaderboard(Ledger(database), self.allowlist, self.run.spec)
        self.admission = Admission(
            database,
            self.run.spec,
            self.run.key(),
            self.sign_in,
            self.allowlist,
            now=lambda: time.time() + self.later,
        )
        self.bulletin = Bulletin(database)
        self.polls = Polls(database, self.allowlist, self.sign_in)

    def status(self) -> RunStatus:
        return RunStatus(
            name=self.run.spec.name,
            goal=self.run.spec.goal,
            fingerprint=self.run.spec.fingerprint,
            address=self.address,
            round=0,
            target_batch_size=64,
            samples_in_round=0,
            samples=0,
            samples_per_second=0.0,
            seconds_to_next_round=None,
            failed_rounds=0,
            computing_share=None,
            checkpoint_round=0,
            learning_rate=0.01,
            volunteers=[],
            heldout=[],
            rounds=[],
        )


@dataclass
class Browser:
    """Of one person."""

    client: TestClient
    hub: Accounts

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(path, follow_redirects=False, **options)

    def sign_in(self, name: str, to: str = "me") -> Any:
        """The answer that leads back from the provider."""
        begun = self.get(f"/sign-in?to={to}")
        assert begun.status_code == 302, begun.text
        return self.get(self.hub.allow(begun.headers["location"], name).removeprefix(ADDRESS))

    @property
    def token(self) -> str:
        found = re.search(r'name="form" value="([^"]+)"', self.client.get("/me").text)
        assert found is not None
        return found[1]

    def post(self, path: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        """Send a form as a browser does, from a page of this server."""
        if "form" not in fields:
            fields["form"] = self.token
        files = {"file": fields.pop("file")} if "file" in fields else None
        return self.client.post(
            path, data=fields, files=files, headers={"Origin": ADDRESS, **(headers or {})}, follow_redirects=False
        )


@pytest.fixture(scope="module")
def _hub() -> Iterator[Accounts]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(_hub: Accounts) -> Accounts:
    _hub.alter.clear()
    _hub.redirect_uris = {CALLBACK}
    for name in ("asha", "rafiq", "mitu", "guesser"):
        _hub.add(name, "village")
    return _hub


@pytest.fixture(scope="module")
def own_run(tiny_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with an OAuth client, one for all tests."""
    path = Path(shutil.copytree(tiny_run.path, tmp_path_factory.mktemp("people") / "run"))
    client = path / "keys" / "oauth.json"
    client.touch(mode=0o600)
    client.write_text(json.dumps({"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET}))
    return RunDirectory.open(path)


@pytest.fixture(scope="module")
def _served(own_run: RunDirectory) -> Served:
    return Served(own_run)


@pytest.fixture(scope="module")
def _app(_served: Served, _hub: Accounts) -> FastAPI:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", _hub.url)
        return build_app(_served)  # type: ignore[arg-type]


@pytest.fixture
def served(_served: Served, tmp_path: Path) -> Served:
    _served.begin_anew(tmp_path / "ledger.sqlite")
    return _served


@pytest.fixture
def app(_app: FastAPI, hub: Accounts, served: Served, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setattr("kantha.web.people.SIGN_INS", RateLimitItemPerMinute(10_000))  # all tests are one address
    return _app


@pytest.fixture
def browse(app: FastAPI, hub: Accounts) -> Any:
    """Makes a browser of somebody who is signed in already, or of nobody."""

    def make(name: str | None = None) -> Browser:
        browser = Browser(TestClient(app, base_url=ADDRESS, client=("203.0.113.5", 1234)), hub)
        if name is not None:
            assert browser.sign_in(name).status_code == 303
        return browser

    return make


@pytest.fixture
def newcomer(served: Served, hub: Accounts, monkeypatch: pytest.MonkeyPatch) -> Browser:
    """Nobody, at a coordinator that was started just now: it has not asked the provider anything yet."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    return Browser(TestClient(build_app(served), base_url=ADDRESS), hub)  # type: ignore[arg-type]


@pytest.fixture
def moderator(browse: Any, served: Served) -> Browser:
    browser = browse("mitu")
    served.allowlist.set_moderator("mitu", True, "organizer")
    return browser


@pytest.fixture
def knock(served: Served, identity: PeerIdentity) -> Any:
    """Asks for a membership, as a machine that waits does again and again."""

    def ask(**fields: object) -> Admitted | Waiting:
        fields = {"service": "kaggle", "instance": "notebook 7"} | fields
        return served.admission.admit(MembershipRequest.signed(identity, served.run.spec.fingerprint, **fields))

    return ask


def text_of(answer: Any) -> str:
    return unescape(re.sub(r"\s+", " ", answer.text))


# ---- sign-in


def test_sign_in_asks_for_the_identity_only_and_keeps_no_token(browse: Any, hub: Accounts, served: Served) -> None:
    browser = browse()
    asked = parse_qs(urlsplit(browser.get("/sign-in?to=me").headers["location"]).query)
    assert asked["scope"] == ["openid profile"]
    assert asked["code_challenge_method"] == ["S256"]
    assert asked["redirect_uri"] == [CALLBACK]
    assert len(asked["state"][0]) >= 20
    assert len(asked["nonce"][0]) >= 20

    back = browser.sign_in("asha")
    assert (back.status_code, back.headers["location"]) == (303, f"{ADDRESS}/me")
    cookie = back.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert "max-age=1209600" in cookie
    assert "secure" not in cookie  # this address is http
    session = _session_of(browser)
    assert session.keys() == {"subject", "form"}
    assert session["subject"] == hub.people["asha"].subject
    assert served.allowlist.standing("asha").state == State.NEW


def _session_of(browser: Browser) -> Any:
    return json.loads(base64.b64decode(browser.client.cookies["kantha"].split(".")[0]))


def test_a_session_is_an_account_s_whoever_has_its_name_now(
    moderator: Browser, browse: Any, hub: Accounts, served: Served, knock: Any
) -> None:
    """mitu takes another name, and a stranger takes hers: her session of before is still hers, and is not his."""
    served.allowlist.decide(["mitu"], "approve", "the organizer")
    account = hub.people["mitali"] = hub.people.pop("mitu")
    account.name = "mitali"
    browse("mitali")
    hub.add("mitu").subject = "number-of-the-stranger"
    stranger = browse("mitu")
    served.allowlist.decide(["mitu"], "ban", "mitali", "took a name")

    code = knock().code
    assert "⛔ A moderator banned you" in stranger.get("/join").text
    for path in ("/me", f"/pair?code={code}"):
        assert "A moderator banned you" in stranger.get(path).text
    assert stranger.get("/desk").status_code == 403

    page = moderator.get("/join").text
    assert '<a href="./me">mitali</a>' in page
    assert "✅ You are in" in page
    for path in ("/me", "/desk"):
        assert "mitali" in moderator.get(path).text
    assert moderator.post("/desk", name="asha", action="approve").status_code == 303
    assert served.allowlist.log()[0].by == "mitali"
    assert moderator.post("/pair", code=code, answer="yes").status_code == 303
    assert knock().certificate.membership.username == "mitali"


def test_the_session_of_an_account_that_is_not_known_is_nobody_s(browse: Any, served: Served, tmp_path: Path) -> None:
    asha = browse("asha")
    served.begin_anew(tmp_path / "another.sqlite")
    assert "Sign in</a>" in asha.get("/").text
    for path in ("/me", "/desk"):
        assert asha.get(path).headers["location"] == f"{ADDRESS}/sign-in?to={path[1:]}"


def test_over_https_the_session_is_for_this_host_and_tls_alone(
    own_run: RunDirectory, hub: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "https://kantha.example"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    client = TestClient(build_app(Served(own_run, address)), base_url=address)  # type: ignore[arg-type]
    cookie = client.get("/sign-in", follow_redirects=False).headers["set-cookie"]
    assert cookie.startswith("__Host-kantha=")
    assert "secure" in cookie
    assert "domain" not in cookie


@pytest.mark.parametrize(
    ("to", "where"),
    [
        ("", "/"),
        ("me", "/me"),
        ("desk", "/desk"),
        ("pair", "/pair"),
        ("pair?code=ABCD-EFGH", "/pair?code=ABCD-EFGH"),
        ("//evil.example/", "/"),
        ("https://evil.example/", "/"),
        ("/\\evil.example", "/"),
        ("\\\\evil.example", "/"),
        ("@evil.example", "/"),
        (".evil.example", "/"),
        ("me\r\nX: 1", "/"),
        ("me\n", "/"),
        ("javascript:alert(1)", "/"),
        ("pair?code=A&x=//evil.example", "/"),
        ("sign-in", "/"),
    ],
)
def test_sign_in_leads_back_to_pages_of_the_run_alone(browse: Any, to: str, where: str) -> None:
    assert browse().sign_in("asha", quote(to, safe="")).headers["location"] == f"{ADDRESS}{where}"


def test_who_says_no_at_the_provider_is_not_signed_in(browse: Any, hub: Accounts) -> None:
    browser = browse()
    back = hub.allow(browser.get("/sign-in").headers["location"], "asha", "deny")
    answer = browser.get(back.removeprefix(ADDRESS))
    assert answer.status_code == 400
    assert "cancelled" in answer.text
    assert browser.get("/me").status_code == 303


def test_what_a_link_says_of_an_error_is_not_repeated(browse: Any) -> None:
    answer = browse().get("/sign-in/callback?error=x&error_description=Call+555-0100+now")
    assert answer.status_code == 400
    assert "555" not in answer.text


def test_an_answer_with_another_state_signs_nobody_in(browse: Any, hub: Accounts) -> None:
    attacker, victim = browse(), browse()
    back = hub.allow(attacker.get("/sign-in").headers["location"], "rafiq").removeprefix(ADDRESS)
    for path in (back, re.sub(r"state=[^&]+", "state=other", back), re.sub(r"&?state=[^&]+", "", back)):
        victim.get("/sign-in")
        answer = victim.get(path)
        assert answer.status_code == 400
        assert "begin it again" in answer.text
    assert victim.get("/me").status_code == 303


def test_an_answer_is_good_once(browse: Any, hub: Accounts) -> None:
    browser = browse()
    back = hub.allow(browser.get("/sign-in").headers["location"], "asha").removeprefix(ADDRESS)
    waiting = dict(browser.client.cookies)
    assert browser.get(back).status_code == 303
    assert browser.get(back).status_code == 400
    # not even with the session of before, which still knows the state
    browser.client.cookies.clear()
    browser.client.cookies.update(waiting)
    assert browser.get(back).status_code == 400


@pytest.mark.parametrize(
    ("endpoint", "change"),
    [
        ("claims", lambda claims: claims | {"nonce": "another"}),
        ("claims", lambda claims: claims | {"aud": "another"}),
        ("claims", lambda claims: claims | {"iss": "https://evil.example"}),
        ("claims", lambda claims: claims | {"exp": 1}),
        ("claims", lambda claims: claims | {"sub": "somebody else"}),
        ("jwks", lambda _: {"keys": []}),
        ("jwks", lambda _: JSONResponse({}, 500)),
        ("token", lambda token: {key: token[key] for key in token if key != "id_token"}),
        ("token", lambda token: token | {"id_token": "e30.e30."}),
        ("token", lambda token: token | {"id_token": 7}),
        ("token", lambda token: token | {"access_token": None}),
        ("token", lambda _: JSONResponse([])),
        ("token", lambda _: JSONResponse({}, 500)),
        ("token", lambda _: JSONResponse("nonsense")),
        ("userinfo", lambda info: info | {"sub": "somebody else"}),
        ("userinfo", lambda info: info | {"preferred_username": HOSTILE}),
        ("userinfo", lambda info: {"sub": info["sub"]}),
        ("userinfo", lambda _: JSONResponse({}, 500)),
        ("userinfo", lambda _: JSONResponse([])),
        ("userinfo", lambda info: info | {"orgs": [{"preferred_username": "x"}] * 2_001}),
    ],
)
def test_a_provider_whose_answer_does_not_hold_signs_nobody_in(
    newcomer: Browser, hub: Accounts, served: Served, endpoint: str, change: Any
) -> None:
    hub.alter[endpoint] = change
    answer = newcomer.sign_in("asha")
    assert answer.status_code == 400
    assert "canary" not in answer.text
    assert newcomer.get("/me").status_code == 303
    assert served.allowlist.people() == []


@pytest.mark.parametrize("answer", [JSONResponse({}, 500), JSONResponse([]), JSONResponse({}), JSONResponse("x")])
def test_a_provider_that_is_out_of_order_is_said_and_asked_again(
    newcomer: Browser, hub: Accounts, answer: JSONResponse
) -> None:
    hub.alter["discovery"] = lambda _: answer
    said = newcomer.get("/sign-in")
    assert said.status_code == 400
    assert "Hugging Face does not answer" in said.text
    hub.alter.clear()
    assert newcomer.sign_in("asha").status_code == 303


def test_organisations_arrive_with_the_person(browse: Any, served: Served) -> None:
    served.allowlist.set_rule("village", True, "organizer")
    assert "✅ You are in" in text_of(browse("asha").client.get("/me"))
    assert served.allowlist.standing("asha").by == "rule: member of village"


def test_another_account_does_not_inherit_a_name(browse: Any, hub: Accounts) -> None:
    browse("asha")
    hub.people["asha"].subject = "another-account"
    answer = browse().sign_in("asha")
    assert answer.status_code == 403
    assert "another account" in answer.text


def test_sign_out_ends_the_session(browse: Any) -> None:
    browser = browse("asha")
    assert browser.post("/sign-out").status_code == 303
    assert browser.get("/me").status_code == 303
    assert "kantha" not in browser.client.cookies


@pytest.mark.parametrize("cookie", ["", "garbage", "e30=.x.y", "a" * 5_000, "W10=.1.2"])
def test_a_session_that_was_made_up_is_nobodys(browse: Any, cookie: str) -> None:
    browser = browse()
    assert browser.get("/me", headers={"Cookie": f"kantha={cookie}"}).status_code == 303


def test_a_run_without_a_client_says_how_to_join_and_how_to_add_one(run_path: Path) -> None:
    served = Served(RunDirectory.open(run_path))
    client = TestClient(build_app(served), base_url=ADDRESS)  # type: ignore[arg-type]
    answer = client.get("/sign-in")
    assert answer.status_code == 404
    assert f"kantha join {ADDRESS}#{served.admission.public_key} --token" in answer.text
    assert CALLBACK in answer.text
    assert "oauth.json" in answer.text
    assert client.get("/sign-in/callback").status_code == 404
    assert "Sign in" in client.get("/pair").text


# ---- forms


@pytest.mark.parametrize(
    ("headers", "form"),
    [
        ({"Origin": "https://evil.example"}, None),
        ({"Origin": "null"}, None),
        ({"Origin": "http://127.0.0.1:1"}, None),  # another program on the same host
        ({"Origin": "http://[::1"}, None),
        ({"Sec-Fetch-Site": "cross-site"}, None),
        ({"Sec-Fetch-Site": "same-site"}, None),
        ({"Sec-Fetch-Site": "none"}, None),
        ({}, ""),
        ({}, "guessed"),
        ({}, "আশা"),
    ],
)
def test_a_form_that_is_not_from_these_pages_does_nothing(
    moderator: Browser, served: Served, knock: Any, headers: dict[str, str], form: str | None
) -> None:
    served.allowlist.decide(["rafiq"], "approve", "organizer")
    code = knock().code
    fields = {"code": code, "answer": "yes", "name": "rafiq", "action": "ban", "reason": "forged"}
    fields |= {"form": moderator.token if form is None else form}
    for path in ("/sign-out", "/pair", "/me", "/desk"):
        assert moderator.post(path, headers, **fields).status_code == 403
    assert served.allowlist.standing("mitu").state == State.NEW
    assert served.allowlist.standing("rafiq").state == State.APPROVED
    assert served.admission.pairing(code) is not None
    assert moderator.get("/me").status_code == 200


def test_the_token_of_another_session_is_no_good(browse: Any, served: Served) -> None:
    asha, rafiq = browse("asha"), browse("rafiq")
    assert rafiq.token != asha.token
    assert asha.post("/me", form=rafiq.token).status_code == 403
    assert served.allowlist.standing("asha").state == State.NEW


@pytest.mark.parametrize(
    "headers",
    [{"Origin": ADDRESS}, {"Sec-Fetch-Site": "same-origin", "Origin": ADDRESS}, {"Origin": "http://127.0.0.1:8600"}],
)
def test_a_form_of_these_pages_is_taken(browse: Any, served: Served, headers: dict[str, str]) -> None:
    assert browse("asha").post("/me", headers).headers["location"] == "./me"
    assert served.allowlist.standing("asha").state == State.ASKED


@pytest.mark.parametrize("path", ["/sign-out", "/pair", "/me", "/desk"])
def test_nobody_who_is_not_signed_in_sends_forms(browse: Any, path: str) -> None:
    answer = browse().client.post(path, data={"form": ""}, headers={"Origin": ADDRESS}, follow_redirects=False)
    assert answer.status_code in (303, 403)
    if answer.status_code == 303:
        assert answer.headers["location"].startswith(f"{ADDRESS}/sign-in")


@pytest.mark.parametrize(
    ("path", "size", "kind", "status"),
    [
        ("/me", 5_000, "application/x-www-form-urlencoded", 413),
        ("/desk", 800_000, "application/x-www-form-urlencoded", 413),
        ("/desk", 100, "application/json", 415),
        ("/me", 100, "text/plain", 415),
        ("/api/v1/memberships", 100, "application/x-www-form-urlencoded", 415),
    ],
)
def test_forms_are_bounded_and_of_their_kind(browse: Any, path: str, size: int, kind: str, status: int) -> None:
    answer = browse("asha").client.post(path, content=b"x" * size, headers={"Content-Type": kind, "Origin": ADDRESS})
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"--x\r\nnonsense"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff\r\n--x--',
        ),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--"),
        ("application/x-www-form-urlencoded", b"%ff=%fe&&&=;%zz"),
        ("application/x-www-form-urlencoded", b"&".join(b"a%d=1" % i for i in range(900))),
    ],
)
def test_a_form_that_is_damaged_is_refused(moderator: Browser, kind: str, content: bytes) -> None:
    answer = moderator.client.post("/desk", content=content, headers={"Content-Type": kind, "Origin": ADDRESS})
    assert answer.status_code in (400, 403)


def test_a_page_says_what_a_browser_may_do_with_it(browse: Any) -> None:
    headers = browse("asha").client.get("/me").headers
    policy = headers["content-security-policy"]
    assert "form-action 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "same-origin"


def local_browser(app: FastAPI, host: str = "127.0.0.1") -> Browser:
    return Browser(TestClient(app, base_url=ADDRESS, client=(host, 1234)), hub=None)  # type: ignore[arg-type]


def form_token(page: str) -> str:
    found = re.search(r'name="form" value="([^"]+)"', page)
    assert found is not None
    return found[1]


def test_in_a_local_run_a_name_signs_in_on_this_machine(web_app: FastAPI, web_coordinator: Coordinator) -> None:
    browser = local_browser(web_app)
    assert browser.get("/me").headers["location"] == f"{ADDRESS}/sign-in?to=me"
    token = form_token(browser.get("/sign-in?to=me").text)
    answer = browser.post("/sign-in", form=token, name="আশা")
    assert (answer.status_code, answer.headers["location"]) == (303, "./me")
    page = text_of(browser.get("/me"))
    assert "You are in" in page
    assert f"kantha join {ADDRESS} --name আশা" in page
    assert browser.get("/desk").status_code == 403
    assert browser.get("/pair?code=ABCD-EFGH").status_code == 404
    web_coordinator.allowlist.set_moderator("আশা", True, "organizer")
    assert browser.get("/desk").status_code == 200
    web_coordinator.allowlist.decide(["আশা"], "ban", "organizer", "spam")
    assert "spam" in text_of(browser.get("/me"))


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("203.0.113.5", {}, 403),
        ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, 403),
        ("127.0.0.1", {"Origin": "https://evil.example"}, 403),
        ("127.0.0.1", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("127.0.0.1", {"Host": "evil.example"}, 400),
    ],
)
def test_nobody_else_signs_in_by_a_name(web_app: FastAPI, host: str, headers: dict[str, str], status: int) -> None:
    browser = local_browser(web_app, host)
    token = form_token(browser.get("/sign-in").text)
    assert browser.post("/sign-in", headers, form=token, name="asha").status_code == status
    assert browser.get("/me").status_code == 303


@pytest.mark.parametrize("name", ["", "   ", "x" * 41, "a\nb", "\u202eabc"])
def test_what_can_be_no_name_signs_nobody_in(web_app: FastAPI, name: str) -> None:
    browser = local_browser(web_app)
    token = form_token(browser.get("/sign-in").text)
    assert browser.post("/sign-in", form=token, name=name).status_code in (400, 403)
    assert browser.get("/me").status_code == 303


def test_where_people_have_accounts_a_name_alone_is_not_believed(browse: Any) -> None:
    assert browse("asha").post("/sign-in", name="rafiq").status_code == 404


# ---- pairing


def test_a_machine_is_confirmed_by_its_owner_who_thereby_asks(browse: Any, served: Served, knock: Any) -> None:
    waiting = knock()
    assert isinstance(waiting, Waiting)
    nobody = browse()
    page = nobody.get(f"/{waiting.path}")
    assert waiting.code in page.text
    assert "Kaggle" not in page.text
    assert "notebook 7" not in page.text
    assert unescape(page.text).count(f"{ADDRESS}/sign-in?to=pair%3Fcode%3D{waiting.code}") >= 1

    asha = browse("asha")
    page = text_of(asha.get(f"/{waiting.path}"))
    assert waiting.code in page
    assert "Kaggle" in page
    assert "notebook 7" in page
    assert "If somebody sent you this link, do not confirm" in page
    done = asha.post("/pair", code=waiting.code, answer="yes")
    assert (done.status_code, done.headers["location"]) == (303, "./me")
    assert "⏳ Asked" in text_of(asha.get("/me"))
    answer = knock()
    assert isinstance(answer, Waiting)
    assert answer.state == "asked"

    served.allowlist.decide(["asha"], "approve", "mitu")
    assert isinstance(knock(), Admitted)
    page = text_of(asha.get("/me"))
    assert "✅ You are in" in page
    assert "notebook 7, for 0 s" in page


def test_who_leaves_for_good_is_out_with_all_machines(browse: Any, served: Served, knock: Any) -> None:
    code = knock().code
    asha = browse("asha")
    asha.post("/pair", code=code, answer="yes")
    served.allowlist.decide(["asha"], "approve", "mitu")
    certificate = knock().certificate
    left = asha.post("/me/forget", sure="yes")
    assert left.status_code == 200
    assert asha.get("/me").status_code == 303
    trust = served.admission.trust()
    assert trust.is_revoked(certificate.membership.serial)
    waiting = knock()  # the machine is nobody's now
    assert (waiting.state, waiting.code == code) == ("sign_in", False)
    asha.sign_in("asha")
    assert "You have not asked to join yet" in asha.get("/me").text


@pytest.mark.parametrize("state", ["new", "banned"])
def test_teams_are_for_members(browse: Any, served: Served, state: str) -> None:
    asha = browse("asha")
    if state == "banned":
        served.allowlist.decide(["asha"], "ban", "mitu", "spam")
    assert asha.post("/me/team", action="found", name="Spammers").status_code == 403
    shown = asha.post("/me/shown", shown="nickname", nickname="Rude")
    assert shown.status_code == (403 if state == "banned" else 303)
    assert served.allowlist.teams() == []


def test_a_code_may_be_typed_in_any_way(browse: Any, knock: Any) -> None:
    code = knock().code
    asha = browse("asha")
    for typed in (code.lower(), code.replace("-", " "), f" {code.replace('-', '')} "):
        assert "notebook 7" in asha.get("/pair", params={"code": typed}).text
    assert 'name="code"' in asha.get("/pair").text


def test_no_is_no(browse: Any, served: Served, knock: Any) -> None:
    code = knock().code
    answer = browse("asha").post("/pair", code=code, answer="no")
    assert "Nothing was confirmed" in answer.text
    assert knock().state == "sign_in"
    assert served.allowlist.standing("asha").state == State.NEW


@pytest.mark.parametrize("code", ["ABCD", "ABCD-EFGH-IJKL", "আবকড-আবকড", HOSTILE, "x" * 3_000])
def test_what_can_be_no_code_is_said(browse: Any, code: str) -> None:
    answer = browse("asha").get("/pair", params={"code": code})
    assert answer.status_code == 200
    assert "This can be no code" in answer.text
    assert HOSTILE not in answer.text


def test_a_code_is_good_once_and_for_ten_minutes(browse: Any, served: Served, knock: Any) -> None:
    code = knock().code
    asha, rafiq = browse("asha"), browse("rafiq")
    assert asha.post("/pair", code=code, answer="yes").status_code == 303
    for again in (asha, rafiq):
        refused = again.post("/pair", code=code, answer="yes")
        assert refused.status_code == 403
        assert "used already" in refused.text
        assert "older than ten minutes" in text_of(again.get(f"/pair?code={code}"))
    assert knock().state == "asked"  # it is still Asha's
    assert served.allowlist.standing("rafiq").state == State.NEW


def test_an_old_code_has_ended(browse: Any, served: Served, knock: Any) -> None:
    code = knock().code
    asha = browse("asha")
    served.later = PAIRING_SECONDS + 1
    assert asha.get(f"/pair?code={code}").status_code == 404
    refused = asha.post("/pair", code=code, answer="yes")
    assert refused.status_code == 403
    assert "ended" in refused.text


def test_guessing_codes_is_stopped(browse: Any, knock: Any) -> None:
    guesser = browse("guesser")  # whom no other test counts codes of
    answers = [guesser.get(f"/pair?code=ACDE-FG{number:02}") for number in range(20)]
    assert {answer.status_code for answer in answers} == {404}
    code = knock().code
    for answer in (guesser.get(f"/pair?code={code}"), guesser.post("/pair", code=code, answer="yes")):
        assert answer.status_code == 429
        assert "try again in" in answer.text
    assert browse("rafiq").get(f"/pair?code={code}").status_code == 200


@pytest.mark.parametrize("action", ["refuse", "suspend", "ban"])
def test_who_is_shut_out_confirms_nothing_and_hears_why(browse: Any, served: Served, knock: Any, action: Any) -> None:
    asha = browse("asha")
    code = knock().code
    served.allowlist.decide(["asha"], action, "mitu", f"spam {HOSTILE}")
    for answer in (asha.get(f"/pair?code={code}"), asha.post("/pair", code=code, answer="yes")):
        assert answer.status_code == 403
        assert f"spam {HOSTILE}" in unescape(answer.text)
        assert HOSTILE not in answer.text
    assert knock().state == "sign_in"
    page = asha.get("/me").text
    assert HOSTILE not in page
    assert "⛔" in page
    assert "Ask to join" not in page
    asha.post("/me")
    assert served.allowlist.standing("asha").may_not


# ---- oneself


def test_one_click_asks(browse: Any, served: Served) -> None:
    asha = browse("asha")
    page = asha.get("/me").text
    assert "Ask to join" in page
    assert 'http-equiv="refresh"' not in page
    assert asha.post("/me").status_code == 303
    page = asha.get("/me").text
    assert "⏳ Asked" in page
    assert "Ask to join" not in page
    assert 'http-equiv="refresh"' in page  # for those without JavaScript
    assert f"kantha join {ADDRESS}#{served.admission.public_key}" in page
    asha.post("/me")
    assert [entry.action for entry in served.allowlist.log()] == ["ask"]


def test_pages_of_somebody_send_to_sign_in_first(browse: Any) -> None:
    for path in ("/me", "/desk"):
        answer = browse().get(path)
        assert answer.status_code == 303
        assert answer.headers["location"] == f"{ADDRESS}/sign-in?to={path[1:]}"


def test_the_run_page_says_who_is_signed_in(browse: Any) -> None:
    assert "Sign in</a>" in browse().get("/").text
    page = browse("asha").get("/").text
    assert '<a href="./me">asha</a>' in page
    assert "Sign in</a>" not in page


def test_a_full_disk_is_said(browse: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    asha = browse("asha")

    def refuse(*_: object) -> None:
        raise StorageError("ledger.sqlite: cannot be used; make room on that disk")

    monkeypatch.setattr(served.allowlist, "account", refuse)
    answer = asha.get("/me")
    assert answer.status_code == 503
    assert "make room" in answer.text


# ---- the desk


def test_the_desk_is_for_moderators(browse: Any, served: Served) -> None:
    asha = browse("asha")
    for answer in (asha.get("/desk"), asha.post("/desk", name="asha", action="approve")):
        assert answer.status_code == 403
        assert "asha is no moderator" in answer.text
    assert served.allowlist.standing("asha").state == State.NEW


def test_a_moderator_who_is_banned_is_none(moderator: Browser, served: Served) -> None:
    served.allowlist.decide(["mitu"], "ban", "organizer", "sold the keys")
    assert moderator.get("/desk").status_code == 403
    assert moderator.post("/desk", name="asha", action="approve").status_code == 403
    assert served.allowlist.standing("asha").state == State.NEW


def test_one_click_approves_and_it_is_kept_who_did_it(moderator: Browser, browse: Any, served: Served) -> None:
    asha = browse("asha")
    asha.post("/me")
    desk = moderator.get("/desk").text
    assert "Requests (1)" in desk
    done = moderator.post("/desk", name="asha", action="approve")
    assert (done.status_code, done.headers["location"]) == (303, "./desk")
    desk = moderator.get("/desk").text
    assert "Approve: asha ✅" in desk
    assert "Nobody waits" in desk
    assert "Approve: asha ✅" not in moderator.get("/desk").text  # it is said once
    decision = served.allowlist.log()[0]
    assert (decision.by, decision.action, decision.username) == ("mitu", "approve", "asha")
    assert "✅ You are in" in asha.get("/me").text


def test_a_refusal_takes_a_reason_which_the_person_is_told(moderator: Browser, browse: Any, served: Served) -> None:
    asha = browse("asha")
    asha.post("/me")
    answer = moderator.post("/desk", name="asha", action="refuse")
    assert answer.status_code == 400
    assert "reason" in answer.text
    assert served.allowlist.standing("asha").state == State.ASKED
    assert moderator.post("/desk", name="asha", action="refuse", reason=f"not now {HOSTILE}").status_code == 303
    for page in (asha.get("/me").text, moderator.get("/desk").text):
        assert HOSTILE not in page
        assert f"not now {HOSTILE}" in unescape(page)


@pytest.mark.parametrize("action", ["", "delete", "approve "])
def test_only_what_is_an_action_is_done(moderator: Browser, served: Served, action: str) -> None:
    answer = moderator.post("/desk", name="asha", action=action)
    assert answer.status_code == (303 if action == "approve " else 400)


def test_several_are_ticked_pasted_and_uploaded(moderator: Browser, served: Served) -> None:
    file = ("people.csv", "\ufeffusername,note\r\nnila,x\r\n@tuli,y\r\n".encode(), "text/csv")
    answer = moderator.post("/desk", name=["asha", "rafiq"], names="@kobi\n\nasha", file=file, action="approve")
    assert answer.status_code == 303
    assert {each.username for each in served.allowlist.people(State.APPROVED)} == {
        "asha", "rafiq", "kobi", "nila", "tuli"
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"names": "kobi\nnot a name"},
        {"names": "\n".join(f"n{i}" for i in range(5_001))},
        {"file": ("x.csv", b"\xff\xfe\x00", "text/csv")},
        {"file": ("x.csv", b"kobi\n<script>", "text/csv")},
        {"name": "kobi", "reason": "x" * 301},
        {"name": "ko\nbi"},
    ],
    ids=lambda fields: next(iter(fields), "nothing"),
)
def test_one_mistake_in_a_list_changes_nothing(moderator: Browser, served: Served, fields: dict[str, Any]) -> None:
    answer = moderator.post("/desk", action="approve", **fields)
    assert answer.status_code == 400
    assert "<script>" not in answer.text.replace("<script defer", "")
    assert served.allowlist.people(State.APPROVED) == []


def test_people_are_found_by_name_and_state_and_shown_in_pages(moderator: Browser, served: Served) -> None:
    served.allowlist.decide([f"person{number:03}" for number in range(60)], "approve", "organizer")
    served.allowlist.decide(["person007"], "ban", "organizer", "spam")
    page = moderator.get("/desk", params={"state": "approved"}).text
    assert page.count('class="person-row"') == 50
    later = unescape(re.findall(r'href="./desk(\?[^"]+)"', page)[0])
    assert moderator.get(f"/desk{later}").text.count('class="person-row"') == 9
    page = moderator.get("/desk", params={"q": "SON007"}).text
    assert page.count('class="person-row"') == 1
    assert "banned · by organizer" in text_of(moderator.get("/desk", params={"q": "person007"}))
    assert moderator.get("/desk", params={"q": HOSTILE, "state": "moon"}).status_code == 200
    assert HOSTILE not in moderator.get("/desk", params={"q": HOSTILE}).text


def test_rules_are_shown_and_not_set_here(moderator: Browser, served: Served) -> None:
    served.allowlist.set_rule("village", True, "organizer")
    assert "<strong>village</strong>" in moderator.get("/desk").text
    moderator.post("/desk", action="rule", organisation="evil")
    assert served.allowlist.rules() == ["village"]


# ---- what strangers may cost


def test_a_form_of_a_stranger_or_in_an_odd_encoding_is_not_read(browse: Any) -> None:
    stranger, asha = browse(), browse("asha")
    part = 'Content-Disposition: form-data; name="form"'
    media_type = "multipart/form-data; boundary=x; charset={}"
    for codec, status in (("utf-8", 403), ("UTF-8", 403), ("moon", 415), ("punycode", 415), ("unicode_escape", 415)):
        body = f"--x\r\n{part}\r\n\r\n\\ud800\r\n--x--\r\n"
        headers = {"Origin": ADDRESS, "Content-Type": media_type.format(codec)}
        assert asha.client.post("/me", content=body, headers=headers).status_code == status
        answer = stranger.client.post("/me", content=b"\xff" * 100, headers=headers, follow_redirects=False)
        assert answer.headers.get("location", "").startswith(f"{ADDRESS}/sign-in")


def test_one_address_begins_and_ends_so_many_sign_ins_in_a_minute(browse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kantha.web.people.SIGN_INS", RateLimitItemPerMinute(2))
    monkeypatch.setattr("kantha.web.people.address_of", lambda _: "203.0.113.77")  # nobody's before
    browser = browse()
    for path, statuses in (("/sign-in", [302, 302, 429]), ("/sign-in/callback?state=x&code=y", [400, 400, 429])):
        assert [browser.get(path).status_code for _ in range(3)] == statuses
