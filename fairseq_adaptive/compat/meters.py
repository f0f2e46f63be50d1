"""A patch of fairseq's trainer: what it logs is of its own training."""


def start_with_empty_meters():
    """Meters of a process begin anew with each trainer, as ``fairseq-train`` has it for its one.

    A second trainer of a process, built by hand, went on averaging those of the first, and ended in ``AttributeError:
    '_DerivedMeter' object has no attribute 'update'`` where one logs a name as a number that the other derives, such as
    ``accuracy`` of ``sentence_prediction`` after that of ``label_smoothed_cross_entropy --report-accuracy``.
    """
    from fairseq.logging import metrics
    from fairseq.trainer import Trainer

    stock = Trainer.__init__

    def __init__(self, *args, **kwargs):
        metrics.reset()
        stock(self, *args, **kwargs)

    Trainer.__init__ = __init__
