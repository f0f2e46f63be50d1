"""The classifier of the hub was here once."""

from fairseq_adaptive.hub.classifier import Prediction, TranskimmerClassifier  # noqa: F401
