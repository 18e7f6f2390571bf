"""WordPiece text to ids, and the token layouts of the retrieval systems.

BERT's basic split (clean text, isolate CJK and punctuation, lower-case, strip accents) and greedy
longest match; words of more than 100 characters are unknown. Special tokens are recognized inside a
string whether blanks surround them or not: `title[SEP]text` holds one separator.

Layouts (`S` is the separator, lengths include it and the classifier token):

| | query | document | cross-encoder row |
|---|---|---|---|
| CAPSTONE | `query` | `single` of title S text S pseudo query | `cross_row(..., last=True)` |
| PROD | `query` | `pair` of title and text | `cross_row` |
| LEAD | `query(..., cut=True)`: may lose its S | `pair` | `cross_row` |
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LONGEST_WORD = 100


class WordPiece:
    """A tokenizer over `words`, the vocabulary in the order of its ids.

    Raises ValueError when [UNK], [CLS] or [SEP] is missing, or [PAD] is not id 0 (masks are
    `ids != 0` throughout).
    """

    def __init__(self, words: Sequence[str], lower_case: bool = True):
        from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

        ids = {word: i for i, word in enumerate(words)}
        for token in ("[UNK]", "[CLS]", "[SEP]"):
            if token not in ids:
                raise ValueError(f"the vocabulary of {len(words)} words has no {token}")
        if ids.get("[PAD]") != 0:
            raise ValueError(f"[PAD] must be id 0 of the vocabulary, not {ids.get('[PAD]')}")
        self.words = list(words)
        self.lower_case = lower_case
        self.ids = ids
        self.classifier, self.separator = ids["[CLS]"], ids["[SEP]"]
        tokenizer = Tokenizer(
            models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD)
        )
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in SPECIAL if t in ids]
        )
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.words)

    def __reduce__(self):
        return WordPiece, (self.words, self.lower_case)

    @staticmethod
    def read(path: str | os.PathLike, lower_case: bool = True) -> WordPiece:
        """A tokenizer of a `vocab.txt`: one word a line, the line number its id."""
        path = Path(path)
        if path.is_dir():
            path = path / "vocab.txt"
        if not path.is_file():
            raise FileNotFoundError(f"no vocabulary file {path}")
        # Lines end where a file's lines do; `splitlines` would also end them at other characters.
        with open(path, encoding="utf-8") as file:
            return WordPiece([line.rstrip("\n") for line in file], lower_case)

    @staticmethod
    def learn(texts: Iterable[str], size: int, lower_case: bool = True) -> WordPiece:
        """A vocabulary of up to `size` words learned from texts, the special tokens first.

        Byte-pair merging inside words, the most frequent pair first, ties in alphabetical order:
        the same texts give the same vocabulary everywhere (the `tokenizers` trainer does not).
        """
        from tokenizers import normalizers, pre_tokenizers

        normalizer, splitter = (
            normalizers.BertNormalizer(lowercase=lower_case),
            pre_tokenizers.BertPreTokenizer(),
        )
        counts: Counter[str] = Counter()
        for text in texts:
            clean = normalizer.normalize_str(text)
            counts.update(word for word, _ in splitter.pre_tokenize_str(clean))
        return WordPiece([*SPECIAL, *_merged_pieces(counts, size - len(SPECIAL))], lower_case)

    def pieces(self, text: str) -> list[int]:
        """Ids of a text, without classifier and final separator."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def pieces_of(self, texts: Sequence[str]) -> list[list[int]]:
        """`pieces` of many texts, on all cores."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [e.ids for e in found]

    def query(self, text: str, length: int, cut: bool = False) -> list[int]:
        """CLS query SEP, at most `length` ids; `cut` slices at the end (the SEP may be lost).

        The typographic apostrophe becomes the ASCII one.
        """
        pieces = self.pieces(text.replace("\u2019", "'"))
        if cut:
            return [self.classifier, *pieces, self.separator][:length]
        return self.framed(pieces, length)

    def single(self, text: str, length: int) -> list[int]:
        """CLS text SEP, the text cut so that both stay."""
        return self.framed(self.pieces(text), length)

    def framed(self, pieces: Sequence[int], length: int) -> list[int]:
        """CLS pieces SEP, at most `length` ids. Raises ValueError where no piece would remain."""
        if length < 3:
            raise ValueError(f"a length of {length} leaves no token between [CLS] and [SEP]")
        return [self.classifier, *pieces[: length - 2], self.separator]

    def pair(self, first: str, second: str, length: int) -> list[int]:
        """CLS first SEP second SEP, the longer text losing tokens first.

        An empty second text leaves `single` of the first, as in Hugging Face's tokenizers.

        Raises ValueError where no token of the texts would remain.
        """
        if not second:
            return self.single(first, length)
        if length < 4:
            raise ValueError(f"a length of {length} leaves no token of title and text")
        left, right = self.pieces(first), self.pieces(second)
        m, n = pair_lengths(len(left), len(right), length - 3)
        return [self.classifier, *left[:m], self.separator, *right[:n], self.separator]


def _merged_pieces(counts: dict[str, int], size: int) -> list[str]:
    """Characters and merged pieces of words, `##` before those inside a word, at most `size`."""
    ordered = sorted(counts)
    spelled = [[w[0], *(f"##{c}" for c in w[1:])] for w in ordered]
    pieces = sorted({piece for word in spelled for piece in word})
    pairs: Counter[tuple[str, str]] = Counter()
    homes: dict[tuple[str, str], set[int]] = {}
    for number, word in enumerate(spelled):
        for pair in itertools.pairwise(word):
            pairs[pair] += counts[ordered[number]]
            homes.setdefault(pair, set()).add(number)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(pieces) < size:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            continue  # counted anew since
        joined = pair[0] + pair[1].removeprefix("##")
        pieces.append(joined)
        changed = set()
        for number in homes.pop(pair):
            word, weight = spelled[number], counts[ordered[number]]
            for old in itertools.pairwise(word):
                pairs[old] -= weight
                changed.add(old)
            merged, i = [], 0
            while i < len(word):
                if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
                    merged.append(joined)
                    i += 2
                else:
                    merged.append(word[i])
                    i += 1
            spelled[number] = merged
            for new in itertools.pairwise(merged):
                pairs[new] += weight
                homes.setdefault(new, set()).add(number)
                changed.add(new)
        for other in changed:
            if pairs[other] > 0:
                heapq.heappush(heap, (-pairs[other], other))
    return list(dict.fromkeys(pieces))[:size]


def pair_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts in `room` tokens, cut longest first."""
    if first + second <= room:
        return first, second
    short, long = sorted((first, second))
    if short > room // 2:
        short, long = room // 2, room - room // 2
    else:
        long = room - short
    return (short, long) if first <= second else (long, short)


def cross_row(query: Sequence[int], document: Sequence[int], last: bool = False) -> list[int]:
    """A cross encoder's row: query and document without CLS and (unless `last`) last SEP."""
    return [*query, *(document[1:] if last else document[1:-1])]


def padded(rows: Sequence[Sequence[int]], length: int, fill: int = 0) -> np.ndarray:
    """Rows of ids as int32 [n, length], `fill` behind them.

    Raises ValueError for a row that is longer.
    """
    table = np.full((len(rows), length), fill, np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"a row of {len(row)} tokens in {length}")
        table[i, : len(row)] = row
    return table


class TokenTable(Sequence):
    """Rows of token ids in one array: far smaller than a list of lists.

    Attributes:
      tokens: int32 [total]. offsets: int64 [rows + 1].
    """

    def __init__(self, rows: Iterable[Sequence[int]]):
        lengths, parts = [0], []
        for row in rows:
            parts.append(np.asarray(row, np.int32))
            lengths.append(len(row))
        self.tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        self.offsets = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row):
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))
