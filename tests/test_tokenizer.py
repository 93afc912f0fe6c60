"""Properties of tokenizer.py, among them the ids of BERT's own tokenizers in golden_wordpiece.json.

The golden file holds a vocabulary and what two tokenizers of transformers make of hostile texts with it: BertTokenizer
(slow, Python) and BertTokenizerFast (fast, Rust); "made_with" says which versions. Under "agree" both give the ids that
stand there. Under "differ" stand texts on which they or Google's original code (google) part; fast is null where it
refuses the text.
"""

import copy
import json
import pickle
import random
import string
from pathlib import Path

import pytest

from tokenizer import SPECIAL_TOKENS, Tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden_wordpiece.json").read_text(encoding="utf-8"))
CAPTIONS = [
    "A red circle is left of a blue square.",
    "a red square, a blue circle",
    "A giraffe eats; another giraffe sleeps.",
    "Ein Fußgänger vor dem Café 中文 한국 Σίσυφος",
    "one zebra",
]


@pytest.fixture
def golden() -> Tokenizer:
    return Tokenizer(GOLDEN["vocab"])


def made_of(*pieces: str) -> Tokenizer:
    return Tokenizer([*SPECIAL_TOKENS, *pieces])


# ------------------------------------------------------------------------------------------------- the same ids as BERT


def test_ids_equal_those_of_bert(golden):
    assert len(GOLDEN["agree"]) > 300
    wrong = [text for text, ids in GOLDEN["agree"] if golden.encode(text) != ids]
    assert not wrong, f"{len(wrong)} texts, the first is {wrong[0]!a}"


def test_a_cached_word_keeps_its_ids(golden):
    texts = [text for text, _ in GOLDEN["agree"]]
    first = [golden.encode(text) for text in texts]
    for text in texts:
        golden.tokenize(text).append("[UNK]")  # a caller may change what it was given
    assert [golden.encode(text) for text in texts] == first


def test_where_the_two_berts_agree_against_google_they_are_followed(golden):
    rows = [row for row in GOLDEN["differ"] if row["slow"] == row["fast"]]
    assert rows
    for row in rows:
        assert row["google"] != row["slow"]
        assert golden.encode(row["text"]) == row["slow"], ascii(row["text"])


def test_where_the_two_berts_differ_google_decides(golden):
    rows = [row for row in GOLDEN["differ"] if row["fast"] is not None and row["slow"] != row["fast"]]
    assert rows
    for row in rows:
        assert golden.encode(row["text"]) == row["google"], ascii(row["text"])


def test_lone_surrogates_are_dropped_as_in_the_slow_bert(golden):
    rows = [row for row in GOLDEN["differ"] if row["fast"] is None]
    assert rows
    for row in rows:
        assert golden.encode(row["text"]) == row["slow"], ascii(row["text"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ångström CAFÉ cafe\u0301", ["angstrom", "cafe", "cafe"]),
        ("İstanbul Straße ΣΑΣ", ["istanbul", "straße", "σασ"]),
        ("ｆｕｌｌ　ｗｉｄｔｈ！", ["ｆｕｌｌ", "ｗｉｄｔｈ", "！"]),
        ("a中文b \uf900\ufa0ec", ["a", "中", "文", "b", "\u8c48", "\ufa0e", "c"]),
        ("x\x00y\ufffdz\x1f\x85\u200b\ue000\ud800w", ["xyzw"]),
        ("a\u2028b\u3000c\u00a0d\te\r\nf", list("abcdef")),
        ("$1^`~ don't «là»—", ["$", "1", "^", "`", "~", "don", "'", "t", "«", "la", "»", "—"]),
        ("👩\u200d👧 ☺\ufe0f", ["👩👧", "☺"]),
        ("", []),
        ("\u0301 \x00 \t", []),
    ],
)
def test_words_are_normalised_as_in_bert(text, words):
    pieces = [c for word in words for c in (word[0], *("##" + c for c in word[1:]))]
    tokenizer = made_of(*dict.fromkeys(pieces))
    assert tokenizer.tokenize(text) == pieces


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_a_special_token_in_a_text_is_ordinary_text(special):
    name = special[1:-1].lower()
    tokenizer = made_of("[", "]", name, "a")
    assert tokenizer.tokenize(f"a {special}{special} a") == ["a", "[", name, "]", "[", name, "]", "a"]
    assert not set(tokenizer.encode(special)[1:-1]) & set(tokenizer.special_ids)


# ------------------------------------------------------------------------------------------------------- pieces and ids


def greedy(word: str, vocab: list[str]) -> list[str]:
    """WordPiece straight from its definition: of all entries that fit here, the longest; [UNK] if none fits."""
    pieces, rest = [], word
    while rest:
        fitting = [e for e in vocab if (e.startswith("##") if pieces else e[:1] != "#")]
        fitting = [e for e in fitting if rest.startswith(e.removeprefix("##"))]
        if not fitting:
            return ["[UNK]"]
        pieces.append(max(fitting, key=len))
        rest = rest[len(pieces[-1].removeprefix("##")) :]
    return pieces


def test_the_longest_match_comes_first():
    dice = random.Random(0)
    unknown = 0
    for _ in range(40):
        parts = {"".join(dice.choices("ab", k=dice.randint(1, 4))) for _ in range(12)}
        entries = [("##" if dice.random() < 0.6 else "") + part for part in sorted(parts)]
        tokenizer = made_of(*entries)
        for word in {"".join(dice.choices("ab", k=dice.randint(1, 9))) for _ in range(40)}:
            assert tokenizer.tokenize(word) == greedy(word, entries)
            unknown += greedy(word, entries) == ["[UNK]"]
    assert 100 < unknown < 1500  # both outcomes are tried


def test_a_word_that_greedy_matching_cannot_finish_is_wholly_unknown():
    tokenizer = made_of("ab", "##cd", "a", "##bcde")
    assert tokenizer.tokenize("abcde a") == ["[UNK]", "a"]


def test_words_of_more_than_100_characters_are_unknown():
    tokenizer = made_of("a", "##a")
    # Counted and not compared, because pytest needs minutes to explain how such long lists differ.
    for word in ("a" * 100, "á" * 100, "a\u0301" * 100):
        assert len(tokenizer.tokenize(word)) == 100
    for word in ("a" * 101, "a" * 500, "á" * 101):
        assert tokenizer.tokenize(word)[:2] == ["[UNK]"]


def test_special_tokens_are_found_at_any_id():
    tokenizer = Tokenizer(["[MASK]", "x", "[SEP]", "[UNK]", "[PAD]", "[CLS]"])
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert ids == (4, 3, 5, 2, 0)
    assert tokenizer.special_ids == (0, 2, 3, 4, 5)
    assert tokenizer.encode("x y") == [5, 1, 3, 2]
    assert len(tokenizer) == 6


def test_truncation_keeps_sep(golden):
    whole = golden.encode("a red circle on the left")
    assert len(whole) > 6
    for length in range(2, len(whole) + 3):
        ids = golden.encode("a red circle on the left", max_tokens=length)
        assert ids == [*whole[: min(length, len(whole)) - 1], golden.sep_id]


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_no_room_for_the_special_tokens_is_refused(golden, length):
    with pytest.raises(ValueError, match=r"max_tokens is .* at least 2"):
        golden.encode("red", max_tokens=length)


def test_decode_joins_pieces_and_leaves_out_padding():
    tokenizer = made_of("un", "##aff", "##able", ",", "dog")
    ids = tokenizer.encode("Unaffable, dog zzz")
    assert tokenizer.decode([*ids, tokenizer.pad_id, tokenizer.pad_id]) == "unaffable , dog [UNK]"
    assert tokenizer.decode([tokenizer.cls_id, tokenizer.mask_id, tokenizer.sep_id]) == "[MASK]"
    assert tokenizer.decode([]) == ""


def test_decode_of_a_tensor_equals_decode_of_a_list():
    torch = pytest.importorskip("torch")
    tokenizer = Tokenizer.build(CAPTIONS)
    ids = tokenizer.encode("a red circle")
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(ids) == "a red circle"


def test_encode_of_decode_gives_the_same_ids():
    tokenizer = Tokenizer.build(CAPTIONS)
    for caption in CAPTIONS:
        ids = tokenizer.encode(caption)
        assert tokenizer.encode(tokenizer.decode(ids)) == ids


@pytest.mark.parametrize("wrong", [-100, -1, 10])
def test_decode_refuses_what_is_no_id(wrong):
    with pytest.raises(ValueError, match=f"id {wrong} is not in the vocabulary: expected 0 to 5"):
        made_of("a").decode([wrong])


def test_memory_stays_bounded(monkeypatch):
    monkeypatch.setattr("tokenizer.MAX_CACHE", 10)
    tokenizer = Tokenizer.build(CAPTIONS)
    for number in range(100):
        tokenizer.encode(f"number {number}")
        assert len(tokenizer._cache) <= 10


def test_a_tokenizer_travels_to_another_process(golden):
    text = GOLDEN["agree"][30][0]
    assert pickle.loads(pickle.dumps(golden)).encode(text) == copy.deepcopy(golden).encode(text) == golden.encode(text)


# ------------------------------------------------------------------------------------------------ building a vocabulary


def test_build_is_deterministic_and_does_not_depend_on_the_order_of_captions():
    vocab = Tokenizer.build(CAPTIONS).vocab
    assert Tokenizer.build(iter(CAPTIONS)).vocab == vocab
    assert Tokenizer.build(CAPTIONS[::-1]).vocab == vocab


def test_build_orders_specials_characters_and_words_by_frequency():
    vocab = Tokenizer.build(["bb bb bb cc cc", "aa, aa", "dd"]).vocab
    assert tuple(vocab[:5]) == SPECIAL_TOKENS
    assert vocab[-3:] == ["bb", "aa", "cc"]
    assert all(len(entry.removeprefix("##")) == 1 for entry in vocab[5:-3])
    first = vocab.index("##0")
    assert vocab[5:first] == sorted(vocab[5:first])  # sorted, because the order of a set changes from run to run
    assert vocab[first:-3] == ["##" + char for char in vocab[5:first] if char.isalnum()]
    assert {*string.punctuation, *string.digits, *string.ascii_lowercase} < set(vocab)


def test_build_spells_rare_words_in_characters():
    tokenizer = Tokenizer.build(CAPTIONS)
    assert tokenizer.tokenize("Giraffe") == ["giraffe"]
    assert tokenizer.tokenize("zebra") == ["z", "##e", "##b", "##r", "##a"]
    assert Tokenizer.build(CAPTIONS, min_count=1).tokenize("zebra") == ["zebra"]


@pytest.mark.parametrize("captions", [[], CAPTIONS])
@pytest.mark.parametrize("min_count", [1, 2])
def test_build_makes_no_word_of_known_characters_unknown(captions, min_count):
    tokenizer = Tokenizer.build(captions, min_count=min_count)
    known = string.printable + "".join(captions)
    dice = random.Random(1)
    for _ in range(500):
        text = "".join(dice.choices(known, k=dice.randint(1, 30)))
        assert "[UNK]" not in tokenizer.tokenize(text), ascii(text)
    for char in known:
        assert "[UNK]" not in tokenizer.tokenize(char * 30), ascii(char)
    assert "[UNK]" not in tokenizer.tokenize("ab" * 50)


def test_build_makes_no_entry_that_no_text_can_reach():
    characters = Tokenizer.build(CAPTIONS, min_count=99)
    for entry in characters.vocab[5:]:
        text = "q" + entry[2:] if entry.startswith("##") else entry
        assert characters.tokenize(text)[-1] == entry
    words = Tokenizer.build(CAPTIONS)
    for entry in words.vocab[len(characters) :]:
        assert words.tokenize(entry) == [entry]


def test_build_keeps_to_max_size():
    smallest = len(Tokenizer.build(CAPTIONS, min_count=99))
    assert Tokenizer.build(CAPTIONS, max_size=smallest + 3).vocab == Tokenizer.build(CAPTIONS).vocab[: smallest + 3]
    with pytest.raises(ValueError, match=f"max_size {smallest - 1} is too small: .* need {smallest}"):
        Tokenizer.build(CAPTIONS, max_size=smallest - 1)


def test_build_takes_captions_that_no_file_can_hold(tmp_path):
    tokenizer = Tokenizer.build(["half an emoji \ud83d and\ud83d", "\x00\u2028\ufffd" * 5, "a" * 101 + " " + "a" * 101])
    tokenizer.save(tmp_path / "vocab.txt")
    assert Tokenizer.from_file(tmp_path / "vocab.txt").vocab == tokenizer.vocab
    assert max(map(len, tokenizer.vocab)) < 100


# ----------------------------------------------------------------------------------------------------- files and errors


def test_save_and_from_file_are_a_round_trip(tmp_path, golden):
    path = tmp_path / "vocab.txt"
    odd = made_of("a\u2028b", "\u0085", "\x1c", " x ", "##中")  # line ends to str.splitlines, but not to BERT
    for tokenizer in (golden, Tokenizer.build(CAPTIONS), odd):
        tokenizer.save(path)
        assert Tokenizer.from_file(str(path)).vocab == tokenizer.vocab
        assert path.read_bytes() == "".join(entry + "\n" for entry in tokenizer.vocab).encode()


def test_from_file_takes_windows_line_ends_and_a_byte_order_mark(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*SPECIAL_TOKENS, "é"]).encode())
    assert Tokenizer.from_file(tmp_path / "vocab.txt").vocab == [*SPECIAL_TOKENS, "é"]


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "a"], r"entries: 4\) lacks \[SEP\] \[MASK\]: use a vocab.txt"),
        ([], r"entries: 0\) lacks \[PAD\] \[UNK\] \[CLS\] \[SEP\] \[MASK\]"),
        ([*SPECIAL_TOKENS, "a", "b", "a"], "holds 'a' 2 times"),
        ([*SPECIAL_TOKENS, "[PAD]"], r"holds '\[PAD\]' 2 times"),
        ([*SPECIAL_TOKENS, ""], "entry 5 of the vocabulary is ''"),
        ([*SPECIAL_TOKENS, "a", "b\nc"], r"entry 6 of the vocabulary is 'b\\nc'"),
    ],
)
def test_a_bad_vocabulary_gives_one_clear_sentence(vocab, message):
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(vocab)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the vocabulary .*vocab.txt: No such file"),
        (b"", r"vocab.txt: the vocabulary \(entries: 1\) lacks"),
        (b"[PAD]\n\xff\xfe\n", "vocab.txt is not UTF-8 text at byte 6"),
        ("\n".join([*SPECIAL_TOKENS, "a", "", "b"]).encode(), "vocab.txt: entry 6 of the vocabulary is ''"),
        (b'{"model": {"type": "WordPiece"}}', r"vocab.txt: the vocabulary \(entries: 1\) lacks \[PAD\]"),
    ],
)
def test_a_bad_file_gives_one_clear_sentence_with_its_name(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_file(path)
    assert "\n" not in str(caught.value)
