"""A model folder to the Hugging Face hub, by its own library.

The token is the library's: from its store (`hf auth login`) or the environment (`HF_TOKEN`). Nothing here names it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled, OIDCError
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id

from kantha.errors import PublishingError, printable

_NOT_ALLOWED = (401, 403)


def check_publishing(repository: str) -> None:
    """Find out early what would keep a model from the hub: a bad name, or no token. Raises `PublishingError`."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PublishingError(f"{printable(error)}; give it as OWNER/NAME") from None
    if "/" not in repository:
        raise PublishingError(
            f"{repository}: whose is it? Give it as OWNER/NAME, where OWNER is you or an organization of yours"
        )
    with _refusals(repository):
        token = get_token()
    if token is None:
        raise PublishingError(
            "no Hugging Face token on this machine; run `hf auth login`, or set the variable HF_TOKEN, "
            "with a token that may write (https://huggingface.co/settings/tokens)"
        )


def upload_model(folder: Path, repository: str, public: bool, message: str, say: Callable[[str], None]) -> str:
    """Put the files of a folder into a model repository, which is made where there is none; returns its address.

    A repository is private until all files are there, and stays so unless it is to be `public`. What the hub has is
    not sent again, be it of an earlier upload or of one that broke off: no whole file, and with Xet, which is the
    library's default, no piece of one.

    Raises `PublishingError`, also where the repository is public already and is not meant to be.
    """
    files = [path for path in folder.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    with _refusals(repository):
        api = HfApi(token=True)  # the stored one, even where the user told the library not to send it unasked
        url = api.create_repo(repository, private=True, exist_ok=True)
        is_private = api.model_info(repository).private
        if not is_private and not public:
            raise PublishingError(
                f"{url}: is public already; add --public to upload there, or give another name for a private one"
            )
        say(f"uploading {len(files)} files, {size / 1e6:.1f} MB, to {url} ({'private' if is_private else 'public'}) …")
        if not sys.stderr.isatty():
            hub_logging.set_verbosity_info()  # lines every half minute instead of bars
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        if is_private and public:
            api.update_repo_settings(repository, private=False)
    return str(url)


@contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """Whatever the library says, as one line."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise PublishingError("the hub's library is told to stay offline; unset HF_HUB_OFFLINE and try again") from None
    except (HTTPError, OSError, OIDCError, ValueError, RuntimeError) as error:
        # the library says of an upload in a thread only which file it was; why is behind that
        cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status in _NOT_ALLOWED:
            raise PublishingError(
                f"{repository}: the hub does not let this token write there ({status}); check OWNER, and give a token "
                "with the right to write by `hf auth login` or HF_TOKEN"
            ) from None
        said = cause.server_message if isinstance(cause, HfHubHTTPError) else None
        reason = printable(" ".join((said or str(cause)).split()) or type(cause).__name__, 300)
        raise PublishingError(
            f"{repository}: the upload broke off ({reason}); run the same command again: what has arrived is not sent "
            "again"
        ) from None
