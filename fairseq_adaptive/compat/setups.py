"""A patch of fairseq's trainer: it asks what a training would do before it starts."""


def check_setups():
    """What would train something else than its flags say is refused; see :func:`fairseq_adaptive.setups.check_setup`.

    fairseq builds task, model, criterion and optimizer without a word of how they fit each other.
    """
    from fairseq.trainer import Trainer

    stock = Trainer.__init__

    def __init__(self, cfg, task, model, criterion, *args, **kwargs):
        from fairseq_adaptive.setups import check_setup  # knows models and criterions, which need the patches

        check_setup(cfg, model, criterion)
        stock(self, cfg, task, model, criterion, *args, **kwargs)

    Trainer.__init__ = __init__
