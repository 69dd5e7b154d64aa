import importlib
import random
from itertools import pairwise, product

import pytest

from kantha.corpus import normalize, split_sentences
from kantha.corpus.normalize import normalizer_of

ZWNJ, ZWJ = "\u200c", "\u200d"
module = importlib.import_module("kantha.corpus.normalize")  # its name is that of its function, too


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("ওয়\u09be", "ওয\u09bc\u09be"),  # a nukta letter and its two parts are one spelling
        ("\u09df", "\u09af\u09bc"),
        ("ক\u09c7\u09beন", "ক\u09cbন"),
        ("  এক\u00a0\tদুই  ", "এক দুই"),
        ("এক \r\n\n দুই\u2028তিন", "এক\nদুই\nতিন"),
        ("এক\u200bদুই\ufeff\x00\xad", "একদুই"),
        ("\ud83d ভাঙা", "ভাঙা"),  # half of a surrogate pair, as broken JSON has it
        ("শেষ\u09e4 শেষ\u09f7 শেষ| শেষ |", "শেষ। শেষ। শেষ। শেষ।"),
        ("শ্লোক\u09e5 শ্লোক।। শ্লোক || শ্লোক ৷৷", "শ্লোক॥ শ্লোক॥ শ্লোক॥ শ্লোক॥"),
        ("১৷৴৹ আনা", "১৷৴৹ আনা"),  # an amount of money
        ("a | b", "a | b"),
        ("দু:খ নি:শ্বাস অন্ত:পুর আন্ত:নগর", "দুঃখ নিঃশ্বাস অন্তঃপুর আন্তঃনগর"),
        ("যেমন: আম, জাম", "যেমন: আম, জাম"),
        ("সময় ১০:৩০, অনুপাত ২:১", "সময\u09bc ১০:৩০, অনুপাত ২:১"),
        ("নিউজ ডেস্ক:ঢাকা তিনি:বলেন", "নিউজ ডেস্ক:ঢাকা তিনি:বলেন"),
        ("ভাগ্য:", "ভাগ্য:"),
    ],
)
def test_one_spelling(raw: str, canonical: str) -> None:
    assert normalize(raw, "bn") == canonical


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        (f"র{ZWJ}্যাব", f"র{ZWJ}্যাব"),
        (f"র{ZWNJ}্যাব", f"র{ZWJ}্যাব"),
        (f"বাক্{ZWNJ}দত্তা", f"বাক্{ZWNJ}দত্তা"),
        (f"বাক্{ZWNJ}{ZWNJ}দত্তা", f"বাক্{ZWNJ}দত্তা"),
        (f"ডা{ZWNJ}ল {ZWJ}ভা{ZWJ}ত{ZWNJ}", "ডাল ভাত"),
        (f"ঈষত্{ZWJ} হাসি", "ঈষ\u09ce হাসি"),
        (f"পৃথক্{ZWNJ}, তবু", "পৃথক্, তবু"),
        (f"এক {ZWNJ} দুই", "এক দুই"),
    ],
)
def test_joiners_stay_only_where_they_are_seen(raw: str, canonical: str) -> None:
    assert normalize(raw, "bn") == canonical


def test_other_languages_keep_their_own_signs() -> None:
    assert normalize(f"نمی{ZWNJ}خواهم {ZWNJ} a | b", "fa") == f"نمی{ZWNJ}خواهم a | b"
    assert normalize("न:क  क|", "hi") == "न:क क|"


@pytest.mark.parametrize("language", ["bn", "hi"])
def test_normalising_twice_changes_nothing(language: str) -> None:
    letters = "কতযরদুনিব\u09df\u09bc\u09be\u09bf\u09c7\u09cd\u09cd\u09ce"
    alphabet = f'{letters}।॥||৷৹\u09e4\u09e5:{ZWNJ}{ZWJ}{ZWJ} \n\t.?"a1\u00a0\u200b…'
    chance = random.Random(1)
    for _ in range(20_000):
        once = normalize("".join(chance.choices(alphabet, k=chance.randint(1, 12))), language)
        assert normalize(once, language) == once, ascii(once)


@pytest.mark.parametrize("language", ["bn", "hi"])
def test_text_that_is_taken_for_canonical_at_a_glance_is_what_the_rules_make_of_it(
    language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = "".join(map(chr, range(0x980, 0xA00)))
    alphabets = [
        f"{block}{' ' * 20}\n\n\n।॥.?!:|ab1‘”–—²…{ZWNJ}{ZWJ}\u00a0\t\r\u0301",
        "কয\u09df\u09bc\u09be\u09c7\u09cd\u09d7 \n।॥",
    ]
    chance = random.Random(2)
    texts = ["".join(chance.choices(alphabet, k=chance.randint(0, 9))) for alphabet in alphabets for _ in range(15_000)]
    texts += map("".join, product("কয\u09bc\u09be\u09c7\u09cd\u09d7 \n।", repeat=4))
    quick = [normalize(text, language) for text in texts]
    assert sum(map(module._is_canonical, texts)) > 5_000
    monkeypatch.setattr(module, "_is_canonical", lambda text: False)
    for text, canonical in zip(texts, quick, strict=True):
        assert canonical == normalize(text, language), ascii(text)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("বৃষ্টি এল।মাঠ ভিজল। আর?", ["বৃষ্টি এল।", "মাঠ ভিজল।", "আর?"]),
        ("থামো! কে ওখানে?! কেউ না", ["থামো!", "কে ওখানে?!", "কেউ না"]),
        ("ফুল ফোটে॥পাখি ডাকে॥", ["ফুল ফোটে॥", "পাখি ডাকে॥"]),
        ("“চলো।” সে বলল। (পরে ফিরব।) 'না।' হলো", ["“চলো।”", "সে বলল।", "(পরে ফিরব।)", "'না।'", "হলো"]),
        ('সে বলল।"আমি যাব।" তারপর', ["সে বলল।", '"আমি যাব।"', "তারপর"]),
        ("ড. মো. আলী এলেন। ক্রিবি. হঠাৎ।", ["ড. মো. আলী এলেন।", "ক্রিবি. হঠাৎ।"]),
        ("বইটি পড়ুন. তারপর বলুন.", ["বইটি পড়ুন.", "তারপর বলুন."]),
        ("৩.১৪ আর a.b ও index.html?x=1 দেখো", ["৩.১৪ আর a.b ও index.html?x=1 দেখো"]),
        ("নমুনাপাতা.বাংলা খোলো", ["নমুনাপাতা.বাংলা খোলো"]),
        ("প্রথম অর্থ\nদ্বিতীয় অর্থ", ["প্রথম অর্থ", "দ্বিতীয় অর্থ"]),
        ("।\n*** ।", []),
        ("", []),
    ],
)
def test_bengali_sentences(text: str, sentences: list[str]) -> None:
    expected = [normalize(sentence, "bn") for sentence in sentences]
    assert split_sentences(normalize(text, "bn"), "bn") == expected


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            'It rained, e.g. here. "Go!" he said. 3.14 it is',
            ["It rained, e.g. here.", '"Go!"', "he said.", "3.14 it is"],
        ),
        ("यह घर है। वह आया।", ["यह घर है।", "वह आया।"]),
        ("今天下雨。我在家。", ["今天下雨。", "我在家。"]),
    ],
)
def test_sentences_of_other_languages(text: str, sentences: list[str]) -> None:
    assert split_sentences(text, "en") == sentences


@pytest.mark.parametrize("language", ["bn", "hi"])
def test_a_tokenizer_normalises_as_we_do(language: str) -> None:
    letters = "কতযরৰদুনিব\u09df\u09bc\u09be\u09bf\u09c7\u09cd\u09cd\u09ce"
    alphabet = f"{letters}।।॥||৷৹\u09e4\u09e5::{ZWNJ}{ZWJ}{ZWJ}  \n\t\r\x1c\x1f\u2028.?a1\u00a0\u200b\ufeff…é\u0301"
    chance = random.Random(2)
    normalizer = normalizer_of(language)
    for _ in range(20_000):
        raw = "".join(chance.choices(alphabet, k=chance.randint(1, 14)))
        canonical = normalize(raw, language)
        assert normalizer.normalize_str(raw).lstrip(" ") == canonical.replace("\n", " "), ascii(raw)
        assert normalizer.normalize_str(canonical) == canonical.replace("\n", " "), ascii(canonical)


def test_text_without_a_full_stop_is_split_by_the_same_rule(corpus_texts: list[str]) -> None:
    def by_terminators(text: str) -> list[str]:
        sentences = []
        for line in text.split("\n"):
            ends = [0, *(match.end() for match in module._TERMINATOR.finditer(line)), len(line)]
            sentences += [line[start:end].strip() for start, end in pairwise(ends)]
        return [sentence for sentence in sentences if any(map(str.isalnum, sentence))]

    chance = random.Random(3)
    texts = ["".join(chance.choices("কখ১ab।॥?!؟'\")”» \n", k=chance.randint(0, 12))) for _ in range(20_000)]
    for text in ["\n".join(corpus_texts), *texts, *map("".join, product("ক।?!a' \n", repeat=5))]:
        assert split_sentences(text, "bn") == by_terminators(text), ascii(text)
