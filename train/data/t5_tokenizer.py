"""T5's SentencePiece vocabulary: its published `spiece.model`, or a small one trained offline.

Ids are the model's own (`<pad>` 0, `</s>` 1, `<unk>` 2), then the sentinels counting down:
`<extra_id_0>` is the last id. Text becomes `... </s>`.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

PAD, EOS, UNK = range(3)
_SENTINEL = re.compile(r"(<extra_id_\d+>)")


@dataclasses.dataclass(frozen=True)
class T5Tokenizer:
    """Text to ids and back.

    Attributes:
      model: the SentencePiece processor.
      sentinels: number of `<extra_id_k>` behind its pieces.
    """

    model: sentencepiece.SentencePieceProcessor
    sentinels: int = 100

    @classmethod
    def load(cls, path: str | Path, sentinels: int = 100) -> T5Tokenizer:
        """From `spiece.model`, or a folder that holds it. Raises FileNotFoundError."""
        path = Path(path)
        path = path / "spiece.model" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no SentencePiece model {path}")
        return cls(sentencepiece.SentencePieceProcessor(model_file=str(path)), sentinels)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int, sentinels: int = 100) -> T5Tokenizer:
        """A unigram model of `vocabulary` ids, sentinels included; fewer where text is short."""
        if vocabulary <= sentinels + 3:
            raise ValueError(f"vocabulary {vocabulary} has no room beside {sentinels} sentinels")
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=written,
            vocab_size=vocabulary - sentinels,
            hard_vocab_limit=False,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
        return cls(model, sentinels)

    def save(self, path: str | Path) -> None:
        """Write the SentencePiece model."""
        Path(path).write_bytes(self.model.serialized_model_proto())

    @property
    def size(self) -> int:
        """Number of ids; published embeddings are padded to a multiple of 128 rows."""
        return self.model.get_piece_size() + self.sentinels

    def sentinel(self, k: int) -> int:
        """Id of `<extra_id_k>`. Raises ValueError when there is none."""
        if not 0 <= k < self.sentinels:
            raise ValueError(f"<extra_id_{k}>: there are {self.sentinels} sentinels")
        return self.size - 1 - k

    def encode(self, text: str) -> list[int]:
        """Ids of a text, sentinels in it included, and `</s>`."""
        ids: list[int] = []
        for part in _SENTINEL.split(text):
            if _SENTINEL.fullmatch(part):
                ids.append(self.sentinel(int(part[10:-1])))
            elif part:
                ids += self.model.encode(part)
        return [*ids, EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids up to the first `</s>`; padding goes, sentinels stay as words."""
        parts: list[str] = []
        run: list[int] = []
        pieces = self.model.get_piece_size()
        for token in [*map(int, ids), EOS]:
            if token == EOS or token >= pieces:
                if run:
                    parts.append(self.model.decode(run))
                    run = []
                if token == EOS:
                    break
                parts.append(f"<extra_id_{self.size - 1 - token}>")
            elif token != PAD:
                run.append(token)
        return " ".join(parts)
