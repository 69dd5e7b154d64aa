"""Which Hugging Face tokens can do nothing but read, by what /api/whoami-v2 says of them."""

from typing import Any

import pytest

from kantha.hub_tokens import TokenAuth


def fine_grained(*permissions: str, everywhere: tuple[str, ...] = ()) -> dict[str, Any]:
    scoped = [{"entity": {"_id": "6a", "type": "user", "name": "asha"}, "permissions": list(permissions)}]
    return {
        "role": "fineGrained",
        "fineGrained": {"canReadGatedRepos": True, "global": list(everywhere), "scoped": scoped},
    }


@pytest.mark.parametrize(
    ("token", "can_only_read"),
    [
        ({"role": "read"}, True),
        (fine_grained(), True),
        (fine_grained("repo.content.read", "user.webhooks.read"), True),
        (fine_grained("collection.read", everywhere=("discussion.read",)), True),
        ({"role": "write"}, False),
        ({"role": "admin"}, False),
        ({"role": "fineGrained"}, False),
        ({}, False),
        (None, False),
        (fine_grained("repo.content.read", "repo.write"), False),
        (fine_grained("inference.serverless.write"), False),
        (fine_grained("repo.content.read", everywhere=("discussion.write",)), False),
        (fine_grained("something.new"), False),
        (fine_grained(""), False),
    ],
)
def test_a_token_can_only_read_where_all_that_is_told_of_it_says_so(
    token: dict[str, Any] | None, can_only_read: bool
) -> None:
    answer = {"type": "oauth"} if token is None else {"type": "access_token", "accessToken": token}
    assert TokenAuth.model_validate(answer).can_only_read is can_only_read
