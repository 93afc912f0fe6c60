"""WordPiece tokenizer with BERT's uncased normalisation.

Given the same vocab.txt, it produces the same ids as BERT's own tokenizer (Devlin et al., arXiv:1810.04805). It can
also build a small vocabulary from captions. One difference: special tokens written out in a text, such as "[MASK]", are
ordinary text here ('[', 'mask', ']'), so a caption can neither mask a word nor end the sequence.

How to read it: split_words splits text into words like BERT; Tokenizer splits words into pieces and maps them to ids.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNK = "[UNK]"
MAX_WORD = 100  # characters; as in BERT, longer words become [UNK]
MAX_CACHE = 200_000  # maximum number of cached chunks, to bound memory

# No normalisation step crosses a chunk boundary, so the pieces of a chunk can be cached.
CHUNK = re.compile(r"[^ \t\n\r]+")

# The ranges of the original BERT code. The Rust tokenizer starts the sixth at U+2B920, apparently a typo.
IDEOGRAPHS = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
)

# ---------------------------------------------------------------------------------------------------------------- words


def bare_words(text: str) -> tuple[str, ...]:
    """The words of a text. Two texts with the same words have the same ids in any vocabulary, and count as one text."""
    return tuple(word for chunk in CHUNK.findall(text) for word in split_words(chunk))


@lru_cache(maxsize=MAX_CACHE)
def split_words(chunk: str) -> list[str]:
    """The lower-case words of a chunk of text, without accents; punctuation marks and CJK ideographs stand alone.

    Where Hugging Face's two BertTokenizers (Python in transformers 4, Rust in tokenizers) disagree, we follow Google's
    original: unassigned code points are kept, and categories are those of Python's Unicode, not of Rust's older table.
    Where both differ from Google, we follow Hugging Face: private use is dropped, and sigma has one lower-case form.
    """
    # Control and format characters are removed without leaving a space. So are lone surrogates (Cs), as in the Python
    # tokenizer; the Rust tokenizer rejects surrogates, and no UTF-8 file can contain them.
    dropped = ("Cc", "Cf", "Co", "Cs")
    kept = (c.lower() for c in chunk if c != "\ufffd" and unicodedata.category(c) not in dropped)
    spread = unicodedata.normalize("NFD", "".join(kept))
    bare = (c for c in spread if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _stands_alone(c) else c for c in bare).split()


def _stands_alone(c: str) -> bool:
    """True for punctuation and ideographs. BERT treats all ASCII symbols, such as $ ^ `, as punctuation."""
    return c in string.punctuation or unicodedata.category(c).startswith("P") or IDEOGRAPHS.match(c) is not None


# ------------------------------------------------------------------------------------------------------- pieces and ids


def count_words(texts: Iterable[str]) -> Counter:
    """The number of occurrences of each word in the texts; a repeated chunk is split only once."""
    counts = Counter()
    for chunk, count in Counter(chunk for text in texts for chunk in CHUNK.findall(text)).items():
        for word in split_words(chunk):
            counts[word] += count
    return counts


class Tokenizer:
    """Converts text to ids and back. A piece that starts with ## continues the previous word.

    Args:    vocab   one entry per id, with the five special tokens in any position
    Raises:  ValueError if a special token is missing, or an entry is duplicated, empty or contains a line break
    """

    def __init__(self, vocab: list[str]):
        self.vocab = list(vocab)
        self._ids = {token: i for i, token in enumerate(self.vocab)}
        if missing := [token for token in SPECIAL_TOKENS if token not in self._ids]:
            raise ValueError(
                f"the vocabulary (entries: {len(self.vocab)}) lacks {' '.join(missing)}: "
                "use a vocab.txt of BERT, one token per line, or Tokenizer.build"
            )
        if len(self._ids) < len(self.vocab):
            token, count = Counter(self.vocab).most_common(1)[0]
            raise ValueError(f"the vocabulary holds {token!r} {count} times: every entry must be unique")
        for i, token in enumerate(self.vocab):
            if not token or "\n" in token or "\r" in token:
                raise ValueError(f"entry {i} of the vocabulary is {token!r}: it must be a single line and not empty")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self._ids[t] for t in SPECIAL_TOKENS)
        self.special_ids = tuple(sorted(self._ids[t] for t in SPECIAL_TOKENS))
        self.continuation_ids = tuple(id for token, id in self._ids.items() if token.startswith("##"))
        self._cache: dict[str, list[str]] = {}  # training reads the same captions repeatedly

    def __len__(self) -> int:
        return len(self.vocab)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Load a vocab.txt (UTF-8, one token per line). Raises ValueError if it cannot be read or is invalid."""
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"cannot read the vocabulary {path}: it is no file")  # reading a pipe would block
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # -sig, because Windows editors write a byte order mark
            return cls(text.removesuffix("\n").split("\n"))
        except OSError as error:
            raise ValueError(f"cannot read the vocabulary {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text at byte {error.start}: save it as UTF-8") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as a vocab.txt, which BERT's own tokenizers can also read."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(token + "\n" for token in self.vocab)

    @classmethod
    def build(cls, captions: Iterable[str], max_size: int = 8000, min_count: int = 2) -> Tokenizer:
        """A vocabulary from captions: special tokens, characters, then words by frequency, ties in alphabetical order.

        The characters are printable ASCII and those in the normalised captions, also as ## pieces if they can continue
        a word, so no word of at most 100 such characters becomes [UNK].

        Args:    captions    an iterable of texts, read once
                 max_size    maximum number of entries; the rarest words are dropped
                 min_count   rarer words are spelled in characters. 2, because a piece seen once would learn to identify
                             its caption, and so that the ## pieces which spell new words occur in training
        Raises:  ValueError if special tokens and characters alone exceed max_size
        """
        counts = count_words(captions)
        printable = split_words("".join(map(chr, range(33, 127))))
        chars = sorted({c for word in [*printable, *counts] for c in word})
        entries = [*SPECIAL_TOKENS, *chars, *("##" + c for c in chars if not _stands_alone(c))]
        if len(entries) > max_size:
            raise ValueError(f"max_size {max_size} is too small: special tokens and characters need {len(entries)}")
        words = [w for w, count in counts.items() if count >= min_count and 1 < len(w) <= MAX_WORD]
        words.sort(key=lambda word: (-counts[word], word))
        return cls(entries + words[: max_size - len(entries)])

    def extended(self, texts: Iterable[str], most: int, min_count: int = 2) -> Tokenizer:
        """This vocabulary plus up to `most` words of the texts that it lacks, most frequent first. No id changes.

        A small vocabulary built from captions can thus be extended by the words of questions.
        """
        counts = count_words(texts)
        new = [w for w, count in counts.items() if count >= min_count and w not in self._ids and len(w) <= MAX_WORD]
        new.sort(key=lambda word: (-counts[word], word))
        return Tokenizer(self.vocab + new[:most])

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that a model has not learned: words read as [UNK] and, in a vocabulary built from
        captions (i.e. one of fewer than 8,000 entries), words spelled letter by letter."""
        pieces = {word: self.tokenize(word) for word in split_words(text)}
        small = len(self) < 8000
        return [word for word, own in pieces.items() if self.vocab[self.unk_id] in own or (small and len(own) > 1)]

    def tokenize(self, text: str) -> list[str]:
        """The word pieces of a text, with [UNK] for a word that cannot be spelled and no other special tokens."""
        pieces = []
        for chunk in CHUNK.findall(text):
            if chunk not in self._cache:
                if len(self._cache) >= MAX_CACHE:
                    self._cache.clear()
                self._cache[chunk] = [piece for word in split_words(chunk) for piece in self._pieces(word)]
            pieces += self._cache[chunk]
        return pieces

    def _pieces(self, word: str) -> list[str]:
        """The pieces of one word, by greedy longest-match-first."""
        if len(word) > MAX_WORD:
            return [UNK]
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._ids), None)
            if end is None:
                return [UNK]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """The ids of [CLS] pieces [SEP], truncated to max_tokens with [SEP] kept. Raises ValueError if that is < 2."""
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"max_tokens is {max_tokens}: it must be at least 2, for [CLS] and [SEP]")
        pieces = self.tokenize(text)[: None if max_tokens is None else max_tokens - 2]
        return [self.cls_id, *(self._ids[piece] for piece in pieces), self.sep_id]

    def __call__(self, texts: str | list[str], max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """One or more texts -> input_ids (b, l), attention_mask (b, l), True = real token; l = the longest"""
        texts = [texts] if isinstance(texts, str) else texts
        return pad([self.encode(text, max_tokens) for text in texts], self.pad_id)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, with pieces joined and without [PAD] [CLS] [SEP]. Raises ValueError for an invalid id."""
        words = []
        for i in ids:
            if not 0 <= i < len(self.vocab):
                raise ValueError(f"id {i} is not in the vocabulary: expected 0 to {len(self.vocab) - 1}")
            if i in (self.pad_id, self.cls_id, self.sep_id):
                continue
            if words and self.vocab[i].startswith("##"):
                words[-1] += self.vocab[i][2:]
            else:
                words.append(self.vocab[i])
        return " ".join(words)


def pad(sequences: list[list[int]], pad_id: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """Lists of ids -> input_ids (b, l), attention_mask (b, l), True = real token; l = the longest, at least length."""
    length = max(length, *map(len, sequences))
    input_ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in sequences])
    attention_mask = torch.tensor([[True] * len(ids) + [False] * (length - len(ids)) for ids in sequences])
    return input_ids, attention_mask
