import re
import shutil
from datetime import date
from pathlib import Path

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from made_up import ADDRESS, MadeUpRun

from kantha.coordinator.admission import SignIn
from kantha.coordinator.allowlist import Person
from kantha.coordinator.rundir import RunDirectory
from kantha.spec import PRESETS, ServiceSpec

HOSTILE = "<script>alert(1)</script>%(name)s"


def make(tiny_run: RunDirectory, folder: Path, sign_in: SignIn) -> MadeUpRun:
    directory = RunDirectory.open(Path(shutil.copytree(tiny_run.path, folder / "run")))
    services = {**PRESETS["albert-large"].services, "hosted": ServiceSpec(rules=HOSTILE)}
    directory.spec = directory.spec.model_copy(update={"services": services})
    return MadeUpRun(directory, sign_in)


@pytest.fixture(scope="module")
def public(tiny_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    run = make(tiny_run, tmp_path_factory.mktemp("public"), "huggingface")

    def come_back(request: Request, name: str) -> None:
        """As from the provider."""
        run.allowlist.sign_in(Person(name, f"number of {name}", "huggingface", ()))
        run.app.state.site.sign_in(request, f"number of {name}")

    run.app.get("/come-back")(come_back)
    return run


def signed_in(run: MadeUpRun, name: str) -> TestClient:
    client = run.client()
    assert client.get(f"/come-back?name={name}").status_code == 200
    return client


def text_of(client: TestClient) -> str:
    """All that a reader sees, in one line."""
    return " ".join(re.sub("<[^>]+>", " ", client.get("/join").text).split())


def test_each_place_has_two_steps_and_its_rules_with_their_date(public: MadeUpRun) -> None:
    html = public.client().get("/join").text
    ways = re.findall(r'<article class="way".*?</article>', html, re.DOTALL)
    assert [re.search("<h3[^>]*>(.*)</h3>", way)[1] for way in ways] == [  # type: ignore[index]
        "Your own machine",
        "Kaggle",
        "Colab",
        "Another hosted notebook",
    ]
    link = public.app.state.site.link
    assert link.startswith(f"{ADDRESS}#")
    for way in ways:
        steps = re.search("<ol.*?</ol>", way, re.DOTALL)[0]  # type: ignore[index]
        assert len(re.findall("<li>", steps)) == 2
        assert f"kantha join {link}</code>" in steps
    colab = ways[2]
    assert "workers of distributed computing are not allowed" in colab
    assert PRESETS["albert-large"].services["colab"].checked == date(2026, 6, 7)
    assert "(as of 7 Jun 2026)" in colab
    assert "One machine of yours at a time." in colab
    assert "Up to 4 machines of yours at once." in ways[0]


def test_an_organizers_words_stay_words(public: MadeUpRun) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;%(name)s" in public.client().get("/join").text
    assert HOSTILE not in public.client().get("/join").text


def test_a_service_that_a_run_does_not_take_is_not_offered(public: MadeUpRun) -> None:
    spec = public.run.spec
    public.run.spec = spec.model_copy(update={"services": {"kaggle": ServiceSpec()}})
    try:
        text = text_of(public.client())
    finally:
        public.run.spec = spec
    assert "Kaggle" in text
    assert "Colab" not in text
    assert "Your own machine" not in text


def test_everybody_sees_their_own_place(public: MadeUpRun) -> None:
    assert "People sign in with Hugging Face" in text_of(public.client())
    client = signed_in(public, "asha")
    assert "You have not asked yet." in text_of(client)
    public.allowlist.ask("asha")
    assert "⏳ You have asked." in text_of(client)
    public.allowlist.decide(["asha"], "approve", "mitu")
    assert "✅ You are in" in text_of(client)
    public.allowlist.decide(["asha"], "ban", "mitu", HOSTILE)
    assert "⛔ A moderator banned you from this run: &lt;script&gt;" in text_of(client)
    assert "You have not asked yet." in text_of(signed_in(public, "rafiq"))


def test_asking_is_one_press(public: MadeUpRun) -> None:
    client = signed_in(public, "nila")
    [token] = set(re.findall(r'name="form" value="([^"]+)"', client.get("/join").text))
    answer = client.post("/me", data={"form": token}, headers={"Origin": ADDRESS}, follow_redirects=False)
    assert answer.status_code == 303
    assert "⏳ You have asked." in text_of(client)


def test_a_run_on_one_machine_offers_that_machine(tiny_run: RunDirectory, tmp_path: Path) -> None:
    text = text_of(make(tiny_run, tmp_path, "local").client())
    assert f"kantha join {ADDRESS} --name YOUR-NAME" in text
    assert "Kaggle" not in text
    assert "Hugging Face" not in text
