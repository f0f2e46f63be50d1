"""Patches of fairseq's generation."""


def let_models_search():
    """A model can name the generator that searches with it.

    The task chooses fairseq's generator or takes one from its caller; commands pass none and models are not asked. Here
    models are: where all agree on a ``generator_class`` and no other is needed, the task builds that.
    """
    from fairseq.tasks import FairseqTask

    stock = FairseqTask.build_generator

    def build_generator(self, models, args, seq_gen_cls=None, *rest, **kwargs):
        if seq_gen_cls is None and not getattr(args, "print_alignment", False):
            wanted = {getattr(model, "generator_class", None) for model in models}
            seq_gen_cls = wanted.pop() if len(wanted) == 1 else None
        return stock(self, models, args, seq_gen_cls, *rest, **kwargs)

    FairseqTask.build_generator = build_generator
