"""The tokenizer in folders of published ALBERTs: a SentencePiece model, and how text is prepared for it."""

import json
import os
import shutil
import unicodedata
from typing import Dict, List

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json

FILE, CONFIG = "spiece.model", "tokenizer_config.json"
PUBLISHED = {"do_lower_case": True, "keep_accents": False}  # where there is no tokenizer_config.json


class AlbertTokenizer:
    """Text to pieces.

    Args:
        path: of the SentencePiece model
        do_lower_case, keep_accents: as in ``tokenizer_config.json``; the defaults leave the text to SentencePiece.
            Without accents there are no `` and '' for quotation marks, either

    Attributes:
        pieces: all of them, in order

    Raises:
        UsageError: when there is no such file, or it is no SentencePiece model
    """

    def __init__(self, path, do_lower_case: bool = False, keep_accents: bool = True):
        from sentencepiece import SentencePieceProcessor

        self.path = os.fspath(path)
        self.do_lower_case, self.keep_accents = do_lower_case, keep_accents
        if not os.path.isfile(path):
            raise UsageError(f"there is no SentencePiece model {path}: name it with --spm")
        try:
            self.processor = SentencePieceProcessor(model_file=self.path)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"{path} is no SentencePiece model: {' '.join(str(error).split())}") from error
        self.pieces = [self.processor.id_to_piece(number) for number in range(self.processor.get_piece_size())]

    @classmethod
    def from_folder(cls, folder) -> "AlbertTokenizer":
        """The tokenizer of a folder in the published layout.

        Raises:
            UsageError: when it has none
        """
        options, path = dict(PUBLISHED), os.path.join(folder, CONFIG)
        if os.path.isfile(path):
            given = read_json(path)
            for name, value in options.items():
                options[name] = given.get(name, value)
                if not isinstance(options[name], bool):
                    raise UsageError(f"{name} in {path} is {str(options[name])[:40]}: it is true or false")
        return cls(os.path.join(folder, FILE), **options)

    def save(self, folder) -> None:
        """Write it to a folder in the published layout."""
        shutil.copyfile(self.path, os.path.join(folder, FILE))
        options = {"do_lower_case": self.do_lower_case, "keep_accents": self.keep_accents}
        with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as file:
            json.dump({"tokenizer_class": "AlbertTokenizer", **options}, file, indent=2)

    def tokenize(self, text: str) -> List[str]:
        """Text to pieces, without [CLS] and [SEP]."""
        return self.processor.encode(self._prepared(text), out_type=str)

    def get_vocab(self) -> Dict[str, int]:
        """All pieces and their numbers, by the name that tokenizers of Hugging Face have for this."""
        return {piece: number for number, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> List[int]:
        """Text to the numbers of its pieces, without [CLS] and [SEP]."""
        return self.processor.encode(self._prepared(text))

    def _prepared(self, text):
        text = " ".join(text.split())
        if not self.keep_accents:
            text = text.replace("``", '"').replace("''", '"')
            text = "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))
        return text.lower() if self.do_lower_case else text
