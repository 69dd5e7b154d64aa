"""From the desk to every volunteer's console, with real processes: announcements, a pause, a run that goes on."""

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from commands import Command, Run, served, small_run, wait_for

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(600)]

HEARD_SECONDS = 60.0  # from the desk to the consoles
_log = logging.getLogger(__name__)
ANNOUNCED = "সভা আজ রাত আটটায়"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with served(tmp_path, small_run(tmp_path)) as run:
        run.serve()
        yield run


class Moderator:
    """At the desk, in a browser without a window."""

    def __init__(self, run: Run, name: str) -> None:
        self._client = httpx.Client(base_url=run.url, headers={"Origin": run.url})
        self._post("/sign-in", "/sign-in", name=name)
        made = run.start("organizer", "members", str(run.run_dir), "moderator", name)
        assert made.process.wait(60) == 0, made.output()

    def _post(self, page: str, path: str, **fields: str) -> None:
        token = re.search(r'name="form" value="([^"]+)"', self._client.get(page).text)
        assert token is not None
        answer = self._client.post(path, data={"form": token[1], **fields})
        assert answer.status_code == 303, answer.text

    def do(self, deed: str, **fields: str) -> None:
        self._post("/desk", f"/desk/{deed}", **fields)


def all_say(commands: list[Command], text: str, run: Run, seconds: float = HEARD_SECONDS) -> float:
    """Until all consoles have said it; seconds that it took."""
    began = time.monotonic()
    wait_for(lambda: all(text in each.output() for each in commands), seconds, f"{text!r}\n{run.story()}")
    return time.monotonic() - began


def test_announcements_and_a_pause_reach_every_console_and_the_run_goes_on(run: Run) -> None:
    asha, rafiq = run.join("Asha"), run.join("Rafiq")
    run.wait_for_volunteer("Asha", 90)
    run.wait_for_volunteer("Rafiq", 60)
    mitu = Moderator(run, "Mitu")

    mitu.do("announce", text=ANNOUNCED, hours="24")
    seconds = all_say([asha, rafiq], ANNOUNCED, run)
    _log.info("announced: in all consoles after %.1f s", seconds)

    mitu.do("pause", reason="the text is being mended")
    seconds = all_say([asha, rafiq], "paused the run: the text is being mended", run)
    _log.info("paused: in all consoles after %.1f s", seconds)

    def stand_still() -> bool:
        status = run.status()
        return status is not None and {each.state for each in status.volunteers} == {"paused"}

    wait_for(stand_still, 30, f"both are paused on the page\n{run.story()}")
    before = run.status()
    assert before is not None
    assert before.paused == "the text is being mended"

    # it is in the books: a coordinator that was killed tells it still
    run.commands[0].kill()
    run.serve(int(run.url.rsplit(":", 1)[1]))
    wait_for(stand_still, 60, f"both are still paused\n{run.story()}")
    assert "the run goes on" not in asha.output()

    # who joins a paused run waits as well, and who was told is not told again
    assert rafiq.leave() == 0
    told = rafiq.output().count(ANNOUNCED)
    rafiq = run.join("Rafiq")
    mark = len(rafiq.output())
    wait_for(lambda: "paused the run" in rafiq.output()[mark:], 90, f"the one who came back is paused\n{run.story()}")
    assert rafiq.output().count(ANNOUNCED) == told == 1
    nila = run.join("Nila")
    all_say([nila], "paused the run", run, 90)
    all_say([nila], ANNOUNCED, run, 10)
    paused = run.status()
    assert paused is not None
    # of what was computed before, at most the round under way and what a leaver handed in were finished
    assert paused.round - before.round <= 1
    assert sum(each.samples_per_second for each in paused.volunteers) == 0

    mitu.do("resume")
    seconds = all_say([asha, rafiq, nila], "the run goes on", run)
    _log.info("resumed: in all consoles after %.1f s", seconds)
    after = run.wait_for_round(paused.round + 3, 120)
    assert after.paused == ""
    assert after.failed_rounds == before.failed_rounds
    run.wait_for_volunteer("Nila", 60)
    assert [asha.leave(), rafiq.leave(), nila.leave()] == [0, 0, 0]
