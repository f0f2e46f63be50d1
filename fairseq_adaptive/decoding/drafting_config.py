"""fairseq's flags of generation, and those of self-speculative decoding."""

from dataclasses import dataclass
from typing import Optional

from fairseq.dataclass.configs import GenerationConfig

from fairseq_adaptive.ranges import LAYERS, Range, ranged

DRAFT = 4


@dataclass
class DraftingGenerationConfig(GenerationConfig):
    self_speculative: Optional[int] = ranged(
        None,
        LAYERS,
        "draft words with the first E depths of the decoder, and verify them with all in one call: the same text, in "
        "less time where the depths agree. For --beam 1, greedy or --sampling",
    )
    draft: int = ranged(DRAFT, Range(int, 1, 64), "how many words --self-speculative drafts at most at a time")
