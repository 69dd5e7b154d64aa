"""A browser on the coordinator's own machine, without a window: of somebody who signs in by a name."""

import re
from html import unescape
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

ADDRESS = "http://127.0.0.1:8600"


class LocalBrowser:
    """Of one person."""

    def __init__(self, app: FastAPI, name: str | None = None, language: str = "en") -> None:
        """:param name: to sign in by; None: nobody is signed in"""
        self.client = TestClient(
            app, base_url=ADDRESS, client=("127.0.0.1", 1234), headers={"Accept-Language": language}
        )
        self._token = self._token_in(self.client.get("/sign-in").text) if name is not None else ""
        if name is not None:
            assert self.post("/sign-in", name=name).status_code == 303
            self._token = self._token_in(self.client.get("/me").text)

    def _token_in(self, page: str) -> str:
        found = re.search(r'name="form" value="([^"]+)"', page)
        assert found is not None, page
        return found[1]

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(path, follow_redirects=False, **options)

    def text(self, path: str) -> str:
        """What a page says, without its markup."""
        answer = self.get(path)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return text_of(answer)

    def post(self, path: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        """Send a form as a browser does, from a page of this server."""
        fields = {"form": self._token, **fields}
        return self.client.post(
            path, data=fields, headers={"Origin": ADDRESS, **(headers or {})}, follow_redirects=False
        )


def text_of(answer: Any) -> str:
    main = answer.text.partition("<body")[2]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", main)).split())
