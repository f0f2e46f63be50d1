"""The tokenizer of published ALBERTs was here once."""

from fairseq_adaptive.data.albert_tokenizer import CONFIG, FILE, PUBLISHED, AlbertTokenizer  # noqa: F401
