"""The certificate of contribution: what it proves, and what does not get through."""

import json
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from kantha.coordinator.certificate import Certificate, Contribution, key_of_run, read_certificate
from kantha.errors import MembershipError, VerificationError
from kantha.swarm.membership import KeyChange, RunKey

RUN = "ab" * 32
NOW = datetime(2026, 3, 4, 12, tzinfo=UTC).timestamp()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[RunKey]:
    folder = tmp_path_factory.mktemp("keys")
    return [RunKey.generate(folder / f"{number}.pem") for number in range(3)]


@pytest.fixture
def certificate(keys: list[RunKey]) -> Certificate:
    contribution = Contribution(
        run=RUN,
        run_name="বাংলা",
        person=7,
        name="আশা",
        samples=12_345,
        seconds=4_500,
        rounds=99,
        first_day=date(2026, 3, 1),
        last_day=date(2026, 3, 4),
    )
    return contribution.signed(keys[0], NOW)


def changes(keys: list[RunKey]) -> list[KeyChange]:
    return [old.change_to(new.public_key, RUN) for old, new in pairwise(keys)]


def test_what_was_signed_holds_after_its_way_through_a_file(certificate: Certificate) -> None:
    again = read_certificate(certificate.model_dump_json(indent=1).encode())
    again.check()
    assert again == certificate
    assert again.sentence == (
        "আশা gave 12,345 samples in 99 rounds and 1.2 hours of computing to the run “বাংলা”, from 2026-03-01 to "
        "2026-03-04 (volunteer 7; as of 2026-03-04 12:00 UTC)"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", "cd" * 32),
        ("run_name", "another"),
        ("person", 8),
        ("name", "Rafiq"),
        ("samples", 12_346),
        ("seconds", 4_501),
        ("rounds", 100),
        ("first_day", "2026-02-28"),
        ("last_day", "2026-03-05"),
        ("issued", int(NOW) + 1),
        ("signature", "0" * 128),
    ],
)
def test_nothing_in_it_can_be_changed(certificate: Certificate, field: str, value: object) -> None:
    changed = read_certificate(json.dumps(certificate.model_dump(mode="json") | {field: value}).encode())
    with pytest.raises(VerificationError, match="changed after it was made"):
        changed.check()


def test_another_key_in_it_is_not_the_runs(certificate: Certificate, keys: list[RunKey]) -> None:
    forged = Contribution(
        **certificate.model_dump(exclude={"samples", "issued", "public_key", "signature"}), samples=10**9
    ).signed(keys[2], NOW)
    forged.check()  # by its own word it is genuine
    with pytest.raises(VerificationError, match="none of this run's"):
        key_of_run(forged, keys[0].public_key)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"\x89PNG\r\n",
        b"<svg",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<svg xmlns='http://www.w3.org/2000/svg'><metadata id='kantha-certificate'>{}</metadata></svg>",
        b"<!DOCTYPE svg [<!ENTITY a 'aaaa'>]><svg>&a;</svg>",
        b"[" * 100_000,
        b" " * 300_000,
    ],
)
def test_what_is_no_certificate_is_said_to_be_none(content: bytes) -> None:
    with pytest.raises(VerificationError) as raised:
        read_certificate(content)
    assert len(str(raised.value).splitlines()) == 1


def test_fields_beyond_what_is_signed_are_refused(certificate: Certificate) -> None:
    with pytest.raises(VerificationError, match="endorsed"):
        read_certificate(json.dumps(certificate.model_dump(mode="json") | {"endorsed": True}).encode())


@pytest.mark.parametrize("known", [0, 1, 2], ids=["the first key", "the second", "the newest"])
def test_after_rotations_an_old_certificate_is_the_runs_from_any_key_of_it(
    certificate: Certificate, keys: list[RunKey], known: int
) -> None:
    chain = changes(keys)
    notice = keys[2].notify(RUN, {}, chain)
    change = key_of_run(certificate, keys[known].public_key, notice.model_dump_json())
    assert change == chain[0]
    newer = Contribution(**certificate.model_dump(exclude={"issued", "public_key", "signature"})).signed(keys[2], NOW)
    assert key_of_run(newer, keys[known].public_key, notice.model_dump_json()) is None


def test_a_replaced_key_signs_nothing_any_more(keys: list[RunKey], certificate: Certificate) -> None:
    chain = changes(keys)
    later = Contribution(**certificate.model_dump(exclude={"issued", "public_key", "signature"})).signed(
        keys[0], chain[0].old_until + 3600
    )
    with pytest.raises(VerificationError, match="after another one had replaced that"):
        key_of_run(later, keys[2].public_key, keys[2].notify(RUN, {}, chain).model_dump_json())


def test_a_stolen_old_key_cannot_make_itself_the_runs(
    certificate: Certificate, keys: list[RunKey], tmp_path: Path
) -> None:
    thief = RunKey.generate(tmp_path / "thief.pem")
    made_up = thief.notify(RUN, {}, [thief.change_to(keys[2].public_key, RUN)])
    with pytest.raises(MembershipError):
        key_of_run(certificate, keys[2].public_key, made_up.model_dump_json())
