"""What docs/fairseq-test-suite.md names in place of ``fairseq-score --sentence-bleu``, which no plug-in can reach."""

import pytest
from fairseq.data.dictionary import Dictionary
from fairseq.scoring import bleu
from sacrebleu.metrics import BLEU

PAIRS = (
    ("a b c d e f", "a b c e e f g"),
    ("x y z", "x y z"),
    ("x y", "x y z"),
    ("w", "v"),
    ("the cat sat on the mat .", "a cat sat on a mat ."),
)


def test_sacrebleu_gives_the_bleu_of_single_sentences():
    # as its command line sets it up with --sentence-level --smooth-method add-k --smooth-value 1 --tokenize none
    theirs = BLEU(smooth_method="add-k", smooth_value=1, tokenize="none", effective_order=True)
    for system, reference in PAIRS:
        words = Dictionary()
        scorer = bleu.Scorer(bleu.BleuConfig(pad=words.pad(), eos=words.eos(), unk=words.unk()))
        scorer.reset(one_init=True)
        scorer.add(*(words.encode_line(line, add_if_not_exist=True) for line in (reference, system)))
        assert theirs.sentence_score(system, [reference]).score == pytest.approx(scorer.score(), abs=1e-3)
