"""Text in one canonical spelling, and its sentences.

What is written differently but read alike becomes one string here, so that the tokenizer meets one spelling and a
document has one hash on every machine. Only Bengali (`bn`) has rules of its own; every other language gets the common
ones.
"""

import re
import unicodedata

from tokenizers import Regex, normalizers

# Control, format, private-use and surrogate characters, except white space and the two joiners. They are listed, not
# asked from `unicodedata`, so that the hash of a text does not depend on the Unicode version of the interpreter.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\ue000-\uf8ff\U000e0000-\U000e007f\U000f0000-\U0010ffff]"
)
# Characters that nothing here changes when they stand alone: ASCII without `:` and `|`, most of Bengali, a few marks.
_CANONICAL = re.compile(
    "[\n -9;-{}~\u0980-\u0983\u0985-\u098c\u098f\u0990\u0993-\u09a8\u09aa-\u09b0\u09b2\u09b6-\u09b9\u09bc-\u09c4"
    "\u09c7\u09c8\u09cb-\u09ce\u09d7\u09e0-\u09e3\u09e6-\u09f1।॥‘’“”–—]*+"
)
_JOINER = "[\u200c\u200d]"  # ZERO WIDTH NON-JOINER, ZERO WIDTH JOINER
_STRAY_JOINER = re.compile(rf"(?<!\S){_JOINER}+|{_JOINER}+(?!\S)|(?<={_JOINER}){_JOINER}")

_CONSONANT = "[\u0995-\u09b9\u09ce\u09f0\u09f1]"
_HASANTA = "\u09cd"
# A ZWJ between র and hasanta-য makes it র with য-ফলা, not য with রেফ; a hasanta and a joiner before a consonant keep a
# conjunct open; ত, hasanta, ZWJ is how ৎ was written before Unicode 4.1. Anywhere else in Bengali a joiner changes
# nothing that is seen.
_BENGALI_JOINER = re.compile(
    rf"(?P<khanda_ta>\u09a4{_JOINER}*{_HASANTA}\u200d{_JOINER}*)"
    rf"|(?P<ra>(?<=[\u09b0\u09f0]){_JOINER}+(?={_HASANTA}\u09af))"
    rf"|(?<={_HASANTA})(?P<open>{_JOINER}){_JOINER}*(?={_CONSONANT})"
    rf"|{_JOINER}+"
)

_PIPE = re.compile(r"(?<=[\u0980-\u09ff]) ?(\|{1,2})")
_DANDA_LOOKALIKE = re.compile("\u09e4|\u09f7(?![\u09f4-\u09f6\u09f8\u09f9])")  # ৷ before ৴ or ৹ is an amount of money
_TWO_DANDAS = re.compile("। ?।|\u09e5")
_SPACE_BEFORE_DANDA = re.compile(" +(?=[।॥])")
# The first parts of words in which a visarga stands before a consonant. A closed list, because a colon that only lacks
# its space (ডেস্ক:ঢাকা) is more frequent than any other word with a mistyped visarga.
_BEFORE_VISARGA = unicodedata.normalize("NFKC", "দু|নি|অন্ত|আন্ত|পুন|প্রাত|বহি|অধ|স্বত|চতু|মন|শির|বয়")
_VISARGA_TYPED_AS_COLON = re.compile(f"(?<![\u0980-\u09ff\u200c\u200d])({_BEFORE_VISARGA}):(?={_CONSONANT})")

# Besides the Bengali and Latin ones, the full stops of Chinese and Japanese, and of Arabic and Urdu. The patterns begin
# with a plain set of characters, which `re` searches for fast.
_ENDS = "।॥。؟۔?!"
_AFTER_END = r"""[।॥?!.]*+(?:[)\]}”’»]|["'](?!\w))*+"""
_TERMINATOR = re.compile(
    rf"""[{_ENDS}.](?:(?<=[।॥。؟۔])|(?<=[?!])(?![A-Za-z0-9])|(?<=\.)(?=[.?!"')\]}}”’»]*(?:\s|$)))"""
    f"{_AFTER_END}"
)
# The same for text without a full stop, whose rule is no pattern: what is matched is a sentence or the rest of a line.
_SENTENCE_WITHOUT_STOP = re.compile(
    rf"(?=[^\n])[^{_ENDS}\n]*+(?:[?!](?=[A-Za-z0-9])[^{_ENDS}\n]*+)*+(?:[{_ENDS}]{_AFTER_END})?+"
)
_WORD_BEFORE_STOP = re.compile(r"[^\s.]{2}$")
_SYLLABLE = (
    rf"[\u0985-\u09b9\u09ce\u09f0\u09f1](?:\u09bc|{_HASANTA}{_JOINER}?{_CONSONANT})*+[\u0981-\u0983\u09be-\u09cc]*"
)
_BENGALI_WORD_BEFORE_STOP = re.compile(rf"(?:{_SYLLABLE}){{3}}$")
_LONGEST_LOOK_BACK = 40  # characters; three syllables are shorter


def normalize(text: str, language: str) -> str:
    """Return `text` in its canonical spelling; normalising twice changes nothing more.

    Every language: NFKC (so that Bengali য়, ড়, ঢ় are a letter and a nukta), white space folded to single spaces, line
    breaks kept as single `\\n`, control characters dropped, joiners (ZWJ, ZWNJ) kept only inside words.

    Bengali, besides: joiners kept only where they change what is seen; । for its lookalikes and for `|` after a
    Bengali letter, ॥ for two of them, no space before them; a visarga where দু:খ has a colon.

    `language` is an ISO 639 code, as in the run spec.
    """
    # NFKC by hand, for the most frequent letters that it takes apart
    text = text.replace("\u09df", "\u09af\u09bc").replace("\u09dc", "\u09a1\u09bc").replace("\u09dd", "\u09a2\u09bc")
    if _is_canonical(text):
        return text
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
    if "\u200c" in text or "\u200d" in text:
        joined = _bengali_joiners(text) if language == "bn" else _STRAY_JOINER.sub("", text)
        text = unicodedata.normalize("NFKC", joined)  # marks that a joiner held apart may now compose
    text = "\n".join(folded for line in text.splitlines() if (folded := " ".join(line.split())))
    return _bengali_punctuation(text) if language == "bn" else text


def _is_canonical(text: str) -> bool:
    """Whether it is quickly seen that there is nothing to change; true of nearly all Bengali text without joiners."""
    return (
        _CANONICAL.fullmatch(text) is not None
        and not (text[:1].isspace() or text[-1:].isspace())
        and not ("  " in text or " \n" in text or "\n " in text or "\n\n" in text)
        and not (" ।" in text or " ॥" in text or "।।" in text)
        # what NFKC composes (two vowel signs) and reorders (hasanta, nukta)
        and not ("\u09c7\u09be" in text or "\u09c7\u09d7" in text or "\u09cd\u09bc" in text)
    )


def _bengali_joiners(text: str) -> str:
    def kept(match: re.Match[str]) -> str:
        if match["khanda_ta"]:
            return "ৎ"
        return "\u200d" if match["ra"] else match["open"] or ""

    return _BENGALI_JOINER.sub(kept, text)


def _bengali_punctuation(text: str) -> str:
    if "|" in text:
        text = _PIPE.sub(lambda match: "।" * len(match[1]), text)
    text = _TWO_DANDAS.sub("॥", _DANDA_LOOKALIKE.sub("।", text))
    if " ।" in text or " ॥" in text:
        text = _SPACE_BEFORE_DANDA.sub("", text)
    return _VISARGA_TYPED_AS_COLON.sub("\\1ঃ", text) if ":" in text else text


def split_sentences(text: str, language: str) -> list[str]:
    """Split normalised text into sentences, without the space between them; a line break always ends one.

    A terminator keeps the quotes and brackets that close after it. A plain full stop counts only before white space and
    after a word that is no abbreviation: two characters or more, in Bengali, where the danda does its work, three
    syllables or more. When in doubt, two sentences stay together. Pieces without a letter or digit are dropped.
    """
    if "." not in text:
        sentences = _SENTENCE_WITHOUT_STOP.findall(text)
    else:
        word_before_stop = _BENGALI_WORD_BEFORE_STOP if language == "bn" else _WORD_BEFORE_STOP
        sentences = [sentence for line in text.split("\n") for sentence in _split_line(line, word_before_stop)]
    return [
        stripped
        for sentence in sentences
        if (stripped := sentence.strip()) and (stripped[0].isalnum() or any(map(str.isalnum, stripped)))
    ]


def _split_line(line: str, word_before_stop: re.Pattern[str]) -> list[str]:
    if "." not in line:
        return _SENTENCE_WITHOUT_STOP.findall(line)
    sentences = []
    start = 0
    for match in _TERMINATOR.finditer(line):
        at, end = match.span()
        if line[at] != "." or word_before_stop.search(line[max(start, at - _LONGEST_LOOK_BACK) : at]):
            sentences.append(line[start:end])
            start = end
    return [*sentences, line[start:]]


def normalizer_of(language: str) -> normalizers.Normalizer:
    """`normalize` as a part of a tokenizer: raw text has the ids that `normalize` and the tokenizer would give it.

    A model is loaded with plain `transformers`, which knows no `normalize`. Normalised text stays as it is, but for
    line breaks, which are spaces to a tokenizer. Unlike ours, a replacement of `tokenizers` is the same at every match,
    so a rule takes more than one where it replaces different things; the patterns are Oniguruma's.

    One thing is lost: Metaspace marks the first word of a text by where it was in the raw one, so it goes without the
    mark where that place moves: in a text that begins with danda after a space or of two signs, or with an old ৎ.
    """
    invisible = _INVISIBLE.pattern.replace("\ud800-\udfff", "")  # its strings have no surrogates
    steps = [
        # without its first character, a text would not have its first word marked as one
        _replace(rf"^(?:{invisible}|{_JOINER}|\s)+", " "),
        _replace(invisible, ""),
        normalizers.NFKC(),
        _replace("[\t\x1f\u1680]", " "),  # with NFKC, and the line breaks, all that is white space
        _replace("[\v\f\r\x1c-\x1e\x85\u2028\u2029]", "\n"),
        *(
            [_replace(*rule) for rule in _BENGALI_JOINER_RULES]
            if language == "bn"
            else [_replace(_STRAY_JOINER.pattern, "")]
        ),
        normalizers.NFKC(),
        _replace(" (?=[ \n])", ""),
        *([_replace(*rule) for rule in _BENGALI_PUNCTUATION_RULES] if language == "bn" else []),
        _replace("\n[ \n]*", " "),
        # the space before a text is the tokenizer's own, and one after [MASK] means something
        normalizers.Strip(left=False, right=True),
    ]
    return normalizers.Sequence(steps)


def _replace(pattern: str, replacement: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), replacement)


_BENGALI_JOINER_RULES = [
    (rf"\u09a4{_JOINER}*{_HASANTA}\u200d{_JOINER}*", "\u09ce"),
    (rf"\u200c(?<=[\u09b0\u09f0]\u200c)(?={_JOINER}*{_HASANTA}\u09af)", "\u200d"),
    (
        rf"{_JOINER}(?:(?<![\u09b0\u09f0{_HASANTA}]{_JOINER})"
        rf"|(?<={_HASANTA}{_JOINER})(?!{_JOINER}*{_CONSONANT})"
        rf"|(?<=[\u09b0\u09f0]{_JOINER})(?!{_JOINER}*{_HASANTA}\u09af))",
        "",
    ),
]
_BENGALI_PUNCTUATION_RULES = [
    (rf"\|(?<=[\u0980-\u09ff] ?\|{{1,2}})|{_DANDA_LOOKALIKE.pattern}", "।"),
    (_TWO_DANDAS.pattern, "॥"),
    (_SPACE_BEFORE_DANDA.pattern, ""),
    (rf":(?<=(?:^|[^\u0980-\u09ff\u200c\u200d])(?:{_BEFORE_VISARGA}):)(?={_CONSONANT})", "ঃ"),
]
