"""The Bengali catalogue has every text of the pages, and says the same by them."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from babel.messages.catalog import Message
from babel.messages.extract import DEFAULT_KEYWORDS, extract_from_dir
from babel.messages.frontend import parse_mapping_cfg
from babel.messages.pofile import read_po

import kantha.web

ROOT = Path(__file__).parents[2]
CATALOGUE = Path(kantha.web.__file__).parent / "locales" / "bn" / "LC_MESSAGES" / "kantha.po"
# what has to be in a translation as it is in the text: placeholders, tags, commands, addresses
FIXED = re.compile(r"%\(\w+\)s|%%|@\w+|</?\w[^>]*>|`[^`]*`|https?://\S+")


def texts() -> Iterator[tuple[str, str | tuple[str, ...]]]:
    """Where each text of the pages is, and the text; a tuple for those that depend on a number."""
    with (ROOT / "babel.cfg").open(encoding="utf-8") as file:
        methods, options = parse_mapping_cfg(file)
    folder = Path(kantha.web.__file__).parents[1]
    found = extract_from_dir(folder, methods, options, {**DEFAULT_KEYWORDS, "noop": None})
    return ((f"{name}:{line}", text) for name, line, text, _, _ in found)


def translations() -> dict[str, Message]:
    with CATALOGUE.open("rb") as file:
        return {(entry.id if isinstance(entry.id, str) else entry.id[0]): entry for entry in read_po(file)}


def test_every_text_has_a_translation() -> None:
    known = translations()
    missing = {
        text: place
        for place, text in texts()
        if (entry := known.get(text if isinstance(text, str) else text[0])) is None
        or not all([entry.string] if isinstance(entry.string, str) else entry.string)
    }
    assert missing == {}, "`pybabel extract` and `pybabel update` enter them; CONTRIBUTING.md has the commands"


@pytest.mark.parametrize("number", [0, 1])
def test_a_translation_keeps_what_is_filled_in(number: int) -> None:
    def fixed(text: str) -> Counter[str]:
        return Counter(FIXED.findall(text))

    for entry in translations().values():
        one, many = (entry.id, entry.id) if isinstance(entry.id, str) else entry.id
        strings = [entry.string] if isinstance(entry.string, str) else list(entry.string)
        if entry.id and number < len(strings):
            assert fixed(strings[number]) in (fixed(one), fixed(many)), entry.id
