"""One front door for Python programs: trained models of every family, from a file, a folder or a name.

Example::

    from fairseq_adaptive import hub

    model = hub.from_pretrained("checkpoints/checkpoint_best.pt")  # or a folder, or a name of the zoo or the Hugging Face hub
    model.encode(["a good film"])  # numbers of words, [B, T], and a mask
    model.predict(["a good film"])[0].label  # or translate, sample, score, answer, as the family allows
    model.trace  # what the last call computed, by the stack's name
    model  # in a notebook: its last texts, coloured by depth or skimming, and how long tapes were
    model.save_pretrained("FOLDER")  # config.json, model.safetensors, dictionaries and tokenizer

===============================  ================================  =========================================
trained by ``--task``            class                             beside ``encode``
===============================  ================================  =========================================
``sentence_prediction``          :class:`TranskimmerClassifier`    ``predict``
``question_answering``           :class:`TranskimmerReader`        ``answer``
``translation``                  :class:`Translator`               ``translate``, ``score``
``language_modeling``,           :class:`LanguageModel`            ``sample``, ``score``
``segmented_language_modeling``
``masked_lm``, ``masked_lm_sop``  :class:`MaskedLanguageModel`     ``predict``
``image_classification``         :class:`ImageClassifier`          ``predict``
``parity``                       :class:`ParityModel`              ``predict``
(published ALBERT-ACT)           :class:`AlbertActModel`           ``depths``, and the model's own call
===============================  ================================  =========================================

Where fairseq is not installed, folders of :meth:`~fairseq_adaptive.hub.pretrained.Pretrained.save_pretrained` load with
torch and safetensors alone: classifiers of ``transkimmer`` and ``albert_act``, and the encoders of translation models,
as :class:`Encoder`. All else is refused by name.
"""

import importlib

_WHERE = {
    "AlbertActModel": "hub.albert_act",
    "AlbertActOutput": "hub.albert_act",
    "Answer": "hub.reader",
    "Encoder": "hub.encoder",
    "ImageClassifier": "hub.tapes",
    "LanguageModel": "hub.generating",
    "MaskedLanguageModel": "hub.masked_words",
    "ParityModel": "hub.tapes",
    "Prediction": "hub.classifier",
    "Pretrained": "hub.pretrained",
    "TranskimmerClassifier": "hub.classifier",
    "TranskimmerReader": "hub.reader",
    "Translator": "hub.generating",
    "from_pretrained": "hub.loading",
}
__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"fairseq_adaptive.{_WHERE[name]}"), name)


def __dir__():
    return sorted({*globals(), *_WHERE})
