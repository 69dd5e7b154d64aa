"""A volunteer's link goes down and comes back, in network namespaces of this test's own."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import wait_for
from peers import Start, near, reach

pytestmark = [pytest.mark.network, pytest.mark.slow]

CUT_SECONDS = 30.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """Two hosts, `hub` and `home`, on one wire; addresses that look public, for libp2p leaves out private ones."""

    HUB, HOME = "5.77.1.1", "5.77.1.2"

    def __init__(self) -> None:
        self.hub, self.home = (f"kantha-{name}-{os.getpid()}" for name in ("hub", "home"))
        for name in (self.hub, self.home):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.hub, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", self.home)
        for name, address in ((self.hub, self.HUB), (self.home, self.HOME)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")

    def link(self, state: str) -> None:
        ip("-n", self.home, "link", "set", "wire", state)

    def close(self) -> None:
        for name in (self.hub, self.home):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    try:
        hosts = Hosts()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield hosts
    hosts.close()


def test_a_volunteer_whose_link_was_down_comes_back(hosts: Hosts, start: Start, tmp_path: Path) -> None:
    hub = {"prefix": ["ip", "netns", "exec", hosts.hub], "host": Hosts.HUB}
    home = {"prefix": ["ip", "netns", "exec", hosts.home], "host": Hosts.HOME}
    averager = start("averager", role="averager", **hub)
    asha, rafiq = start("asha", **hub), start("rafiq", **home)
    reach([averager, asha, rafiq], 2)
    hosts.link("down")
    cut_at, since = asha.round, time.monotonic()
    wait_for(lambda: time.monotonic() - since > CUT_SECONDS, CUT_SECONDS + 10, "the cut")
    assert asha.round >= cut_at + 2, "the others went on"
    hosts.link("up")
    reach([rafiq], asha.round)
    reach([averager, asha, rafiq], asha.round + 3)
    near([averager, asha, rafiq])
