"""What a Hugging Face token may do, as /api/whoami-v2 tells (https://huggingface.co/docs/hub/security-tokens).

Volunteer and coordinator go by the same rule: a token that may do more than read is not sent by the one, and not taken
by the other.
"""

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Scoped(_Answer):
    permissions: list[str] = []


class _FineGrained(_Answer):
    everywhere: list[str] = Field([], alias="global")
    scoped: list[_Scoped] = []


class _AccessToken(_Answer):
    role: str = ""  # read, write or fineGrained
    fine_grained: _FineGrained | None = Field(None, alias="fineGrained")


class TokenAuth(_Answer):
    """The field `auth` of that answer."""

    access_token: _AccessToken | None = Field(None, alias="accessToken")

    @property
    def can_only_read(self) -> bool:
        """Permissions are words like `repo.content.read` and `inference.serverless.write`; unknown ones may write."""
        token = self.access_token
        if token is None:  # of an application, as `hf auth login` in a browser makes them: what it may do is not told
            return False
        if token.role != "fineGrained" or token.fine_grained is None:
            return token.role == "read"
        permissions = [
            *token.fine_grained.everywhere,
            *(permission for each in token.fine_grained.scoped for permission in each.permissions),
        ]
        return all(permission.endswith(".read") for permission in permissions)
