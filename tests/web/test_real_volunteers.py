"""Real volunteers of a real run: what the pages tell of them, and what leaves with one who leaves for good."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import LEAVE_SECONDS, Command, Run, served, small_run, wait_for


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with served(tmp_path, small_run(tmp_path)) as run:
        run.serve()
        yield run


def token(page: httpx.Response) -> str:
    found = re.search(r'name="form" value="([^"]+)"', page.text)
    assert found is not None
    return found[1]


@pytest.mark.slow
@pytest.mark.swarm
@pytest.mark.timeout(600)
def test_the_board_certificates_and_leaving_for_good(run: Run, tmp_path: Path) -> None:
    volunteers = [run.join(name) for name in ("asha", "rafiq")]
    for name in ("asha", "rafiq"):
        run.wait_for_volunteer(name, 240)
    with httpx.Client(base_url=run.url, headers={"Origin": run.url}, follow_redirects=True, timeout=30.0) as asha:

        def send(path: str, **fields: str) -> httpx.Response:
            page = asha.get("/sign-in?to=me" if path == "/sign-in" else "/me")
            return asha.post(path, data={"form": token(page), **fields})

        assert "Your place in this run" in send("/sign-in", name="asha").text
        assert send("/me/shown", shown="nickname", nickname="Starling").status_code == 200
        wait_for(lambda: "Starling" in asha.get("/api/v1/status").text, 30, "the status has the nickname")
        assert '"asha"' not in asha.get("/api/v1/status").text

        for volunteer in volunteers:
            assert volunteer.leave() == 0, volunteer.output()
        wait_for(lambda: not asha.get("/api/v1/status").json()["volunteers"], 60, "nobody is here")
        total = asha.get("/api/v1/status").json()["samples"]

        def counted() -> bool:
            board = asha.get("/api/v1/volunteers").json()
            return bool(board["total"]["samples"] == total == sum(place["samples"] for place in board["places"]))

        wait_for(counted, 60, "all samples of the run are somebody's")
        places = {place["name"]: place for place in asha.get("/api/v1/volunteers").json()["places"]}
        assert places.keys() == {"Starling", "rafiq"}

        file = tmp_path / "certificate.svg"
        file.write_bytes(asha.get(f"/volunteers/{places['Starling']['number']}/certificate.svg").content)
        key = asha.get("/api/v1/run").json()["public_key"]
        verify = Command(tmp_path, "verify", "verify-certificate", str(file), "--link", f"{run.url}#{key}")
        assert verify.process.wait(LEAVE_SECONDS) == 0, verify.output()
        assert f"It holds: Starling gave {places['Starling']['samples']:,} samples" in verify.output()

        assert "You are forgotten" in send("/me/forget", sure="yes").text
        wait_for(lambda: "Starling" not in asha.get("/volunteers").text, 30, "the board names nobody who left")
        board = asha.get("/api/v1/volunteers").json()
        assert board["total"]["samples"] == total
        assert board["hidden"] == {name: places["Starling"][name] for name in ("people", "samples", "seconds")}
