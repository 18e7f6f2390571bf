"""CodeT5's byte-level BPE: its published vocabulary files, or a small one trained offline.

Layout of the ids, as in Salesforce/codet5-base and the CoditT5 checkpoints made from it: `<pad>`
0, `<s>` 1, `</s>` 2, `<unk>` 3, `<mask>` 4, the BPE's own, 100 sentinels counting down
(`<extra_id_0>` is the last), then the 24 edit tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxmodels.language.edit_plans import EDIT_TOKENS

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
PAD, BOS, EOS, UNK, MASK = range(5)
SENTINELS = 100
_log = logging.getLogger(__name__)
_cut = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class CodeTokenizer:
    """Text to ids `<s> ... </s>` and back.

    Attributes:
      tokenizer: byte-level BPE with sentinels and, for CoditT5, the edit tokens added.
    """

    tokenizer: Tokenizer

    @classmethod
    def load(cls, folder: str | Path, *, edit_tokens: bool = True) -> CodeTokenizer:
        """From `vocab.json` and `merges.txt` (`added_tokens.json` if there), or `tokenizer.json`.

        Sentinels that the files lack are added behind the others, and so are, with `edit_tokens`,
        those of plans: a CodeT5 that writes no plans keeps its 32,100 rows.

        Raises FileNotFoundError naming what is missing.
        """
        folder = Path(folder)
        whole = folder / "tokenizer.json"
        if whole.is_file():
            return cls(_complete(Tokenizer.from_file(str(whole)), edit_tokens))
        files = [folder / name for name in ("vocab.json", "merges.txt")]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise FileNotFoundError(f"{folder}: no {' and no '.join(missing)}")
        bpe = models.BPE.from_file(*map(str, files), unk_token="<unk>")
        tokenizer = _byte_level(bpe)
        added = folder / "added_tokens.json"
        if added.is_file():
            known = json.loads(added.read_text(encoding="utf-8"))
            for token in sorted(known, key=known.get):
                tokenizer.add_tokens([AddedToken(token, normalized=False)])
                if tokenizer.token_to_id(token) != known[token]:
                    raise ValueError(
                        f"{added}: {token} is {known[token]}, behind the vocabulary it would be "
                        f"{tokenizer.token_to_id(token)}"
                    )
        return cls(_complete(tokenizer, edit_tokens))

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> CodeTokenizer:
        """A BPE of `vocabulary` ids in all, sentinels and edit tokens included.

        Raises ValueError when nothing is left for the text.
        """
        own = vocabulary - SENTINELS - len(EDIT_TOKENS)
        if own < len(SPECIAL) + 256:
            least = len(SPECIAL) + 256 + SENTINELS + len(EDIT_TOKENS)
            raise ValueError(f"vocabulary {vocabulary} is below {least}: bytes and special tokens")
        tokenizer = _byte_level(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(
            vocab_size=own,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        # A corpus too small for its merges still gives the stated number of rows.
        short = own - tokenizer.get_vocab_size()
        tokenizer.add_tokens([AddedToken(f"<unused_{i}>", normalized=False) for i in range(short)])
        return cls(_complete(tokenizer))

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` into `folder`."""
        self.tokenizer.save(str(Path(folder) / "tokenizer.json"))

    @property
    def size(self) -> int:
        """Number of ids, V."""
        return self.tokenizer.get_vocab_size()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        sentinels = (f"<extra_id_{k}>" for k in range(SENTINELS))
        return frozenset(map(self.tokenizer.token_to_id, (*SPECIAL, *sentinels)))

    @cached_property
    def _edit_ids(self) -> dict[int, str]:
        ids = {token: self.tokenizer.token_to_id(token) for token in EDIT_TOKENS}
        return {n: token for token, n in ids.items() if n is not None}

    def pieces(self, text: str) -> list[int]:
        """Ids of a text without the `<s>` and `</s>` around it."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Ids `<s> ... </s>` of a text without the blanks around it, as the published code has it.

        So neither an empty context nor an empty plan leaves the token of a lone blank.
        """
        return [BOS, *self.pieces(text.strip()), EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids up to the first `</s>`: no special tokens, blanks around edit tokens."""
        parts: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                parts.append(self.tokenizer.decode(run, skip_special_tokens=False))
                run.clear()

        for token in map(int, ids):
            if token == EOS:
                break
            if token in self._edit_ids:
                flush()
                parts.append(self._edit_ids[token])
            elif token in self._special_ids:
                flush()
            else:
                run.append(token)
        flush()
        return " ".join(part.strip(" ") for part in parts)

    def check_rows(self, rows: int) -> None:
        """Refuse an embedding with fewer rows than there are ids, with both numbers."""
        if rows < self.size:
            raise ValueError(
                f"the embedding has {rows} rows, the tokenizer {self.size} tokens "
                f"({len(self._edit_ids)} edit tokens included); set model_args.vocab_size to "
                f"{self.size}"
            )


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _complete(tokenizer: Tokenizer, edit_tokens: bool = True) -> Tokenizer:
    """With the sentinels and, if wanted, edit tokens not there yet, in their published order."""
    wrong = [
        f"{token} is {tokenizer.token_to_id(token)}, not {n}"
        for n, token in enumerate(SPECIAL)
        if tokenizer.token_to_id(token) != n
    ]
    if wrong:
        raise ValueError(f"not a vocabulary of CodeT5's layout: {'; '.join(wrong)}")
    # Special tokens are found in text whatever the merges, as `<s>` inside a target must be.
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    sentinels = [f"<extra_id_{k}>" for k in reversed(range(SENTINELS))]
    edits = [t for t in EDIT_TOKENS if edit_tokens or tokenizer.token_to_id(t) is not None]
    for token in (*sentinels, *edits):
        if tokenizer.token_to_id(token) is None:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
        else:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def padded(
    ids: Sequence[int], length: int, *, truncate: bool, what: str = "sequence"
) -> np.ndarray:
    """Ids int32 `[length]`, right-padded with 0; cut on the right where `truncate` allows it.

    What is cut keeps its last id, `</s>`, as transformers' tokenizers have it. The log counts what
    was cut, at 1, 10, 100, ...

    Raises ValueError with the length for a longer one, and for an empty one.
    """
    if len(ids) == 0:
        raise ValueError(f"empty {what}")
    if len(ids) > length and not truncate:
        raise ValueError(
            f"{what} of {len(ids)} tokens is above the maximum of {length}; allow it with "
            "data.options.truncate=True"
        )
    if len(ids) > length:
        n = next(_cut)
        if 10 ** (len(str(n)) - 1) == n:
            _log.warning("%d sequences cut to their maximum so far, this %s to %d", n, what, length)
    row = np.zeros(length, np.int32)
    row[: min(len(ids), length)] = ids[:length]
    if len(ids) > length:
        row[-1] = ids[-1]
    return row
