"""Patches of fairseq's generation."""

import functools

from fairseq_adaptive.errors import UsageError


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
        if getattr(args, "self_speculative", None) is not None:
            seq_gen_cls = _drafting(seq_gen_cls, args)
        return stock(self, models, args, seq_gen_cls, *rest, **kwargs)

    FairseqTask.build_generator = build_generator


def _drafting(kind, args):
    """The generator of a task that drafts.

    Raises:
        UsageError: where the one that it has cannot
    """
    from fairseq_adaptive.decoding.beam_generator import BeamGenerator
    from fairseq_adaptive.decoding.drafting_config import DRAFT
    from fairseq_adaptive.decoding.speculative_generator import SpeculativeGenerator

    if kind is not BeamGenerator:
        raise UsageError(
            "--self-speculative is for models of shared_transformer and shared_transformer_lm, without --print-alignment and "
            "--replace-unk: leave it out"
        )
    draft = getattr(args, "draft", None) or DRAFT
    return functools.partial(SpeculativeGenerator, exit_depth=args.self_speculative, draft=draft)


def take_drafting_flags():
    """``--self-speculative`` and ``--draft`` of every command that generates.

    fairseq has flags of models, tasks and criterions for others to add to, and none of generation: what is not in its
    GenerationConfig does not reach the task.
    """
    from fairseq import options
    from fairseq.dataclass import configs, initialize

    from fairseq_adaptive.decoding.drafting_config import DraftingGenerationConfig

    stock, config = configs.GenerationConfig, configs.FairseqConfig
    field = config.__dataclass_fields__["generation"]
    field.type = field.default = config.generation = DraftingGenerationConfig
    config.__annotations__["generation"] = DraftingGenerationConfig
    config.__init__.__defaults__ = tuple(
        DraftingGenerationConfig if default is stock else default for default in config.__init__.__defaults__
    )
    configs.GenerationConfig = options.GenerationConfig = DraftingGenerationConfig
    initialize.hydra_init()
