"""Languages: which one a page speaks, and how numbers and times read in it."""

import datetime
from collections.abc import Callable

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kantha.web import speech

LINK = "http://127.0.0.1:8600"


@pytest.mark.parametrize(
    ("code", "make", "text"),
    [
        ("en", lambda: speech.number(12345678.25, 1), "12,345,678.2"),
        ("bn", lambda: speech.number(12345678.25, 1), "১,২৩,৪৫,৬৭৮.২"),
        ("bn", lambda: speech.number(-3.14159, 2), "-৩.১৪"),
        ("en", lambda: speech.number(None), "–"),
        ("bn", lambda: speech.number(float("nan")), "–"),
        ("en", lambda: speech.percent(0.4567), "45.7 %"),
        ("bn", lambda: speech.percent(0.4567), "৪৫.৭ %"),
        ("en", lambda: speech.duration(59.4), "59 s"),
        ("en", lambda: speech.duration(3725), "1 h 2 min"),
        ("en", lambda: speech.duration(4 * 86400), "4 days"),
        ("en", lambda: speech.ago(0.5), "just now"),
        ("en", lambda: speech.moment(0), "1 Jan 1970, 00:00"),
        ("bn", lambda: speech.moment(0), "১ জানু ১৯৭০, ০০:০০"),
        ("bn", lambda: speech.day(datetime.date(2026, 11, 23)), "২৩ নভে ২০২৬"),
    ],
)
def test_numbers_and_times_read_as_people_write_them(code: str, make: Callable[[], str], text: str) -> None:
    with speech.speaking(code):
        assert make() == text


@pytest.mark.parametrize(
    ("headers", "language"),
    [
        ({}, "en"),
        ({"Accept-Language": "bn-BD,bn;q=0.9,en;q=0.8"}, "bn"),
        ({"Accept-Language": "en-GB,bn;q=0.3"}, "en"),
        ({"Accept-Language": "bn;q=0.2,en;q=0.9"}, "en"),
        ({"Accept-Language": "de, fr;q=0.5"}, "en"),
        ({"Accept-Language": ";;;,q=,bn;q=x," + "a" * 10_000}, "en"),
        ({"Cookie": "lang=bn", "Accept-Language": "en"}, "bn"),
        ({"Cookie": "lang=<script>", "Accept-Language": "bn"}, "bn"),
    ],
)
def test_a_page_speaks_the_browsers_language_or_the_chosen_one(
    web_app: FastAPI, headers: dict[str, str], language: str
) -> None:
    page = TestClient(web_app, base_url=LINK, client=("127.0.0.1", 1)).get("/sign-in", headers=headers)
    assert f'<html lang="{language}">' in page.text
    assert {"Accept-Language", "Cookie"} <= set(page.headers["vary"].split(", "))


def test_the_choice_of_a_language_lasts(web_app: FastAPI) -> None:
    client = TestClient(web_app, base_url=LINK, client=("127.0.0.1", 1))
    assert "সাইন ইন" in client.get("/sign-in?lang=bn").text
    assert "সাইন ইন" in client.get("/sign-in").text
    assert "সাইন ইন" not in client.get("/sign-in?lang=en").text
    assert "set-cookie" not in client.get("/join?lang=xx").headers
