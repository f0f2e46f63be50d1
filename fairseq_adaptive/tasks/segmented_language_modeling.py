"""Language modelling over streams of consecutive segments, with a memory from each to the next (truncated BPTT)."""

import inspect
import logging
import os
from dataclasses import dataclass, fields

from fairseq import utils
from fairseq.data import data_utils, iterators
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_adaptive.data.segment_stream import SegmentStream
from fairseq_adaptive.data.segmented_dataset import SegmentedDataset, SegmentIterator
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import check_ranges

logger = logging.getLogger(__name__)

# flags of language_modeling that choose or pad sentences, or targets that are not the next token
WITHOUT_MEANING = (
    "sample_break_mode",
    "output_dictionary_size",
    "self_target",
    "past_target",
    "add_bos_token",
    "shorten_method",
    "pad_to_fixed_length",
    "pad_to_fixed_bsz",
)


@dataclass
class SegmentedLanguageModelingConfig(LanguageModelingConfig):
    pass


def takes_memory(model):
    """Whether the forward of a model, or of its decoder, has an argument ``memory``."""
    forwards = [part.forward for part in (model, getattr(model, "decoder", None)) if part is not None]
    return any("memory" in inspect.signature(forward).parameters for forward in forwards)


@register_task("segmented_language_modeling", dataclass=SegmentedLanguageModelingConfig)
class SegmentedLanguageModelingTask(LanguageModelingTask):
    """Truncated backpropagation through time on the data of ``fairseq-preprocess --only-source`` (Dai et al. 2019).

    The text of a split is cut into ``--batch-size`` x workers contiguous streams, read side by side in segments of
    ``--tokens-per-sample``; every token is predicted once an epoch. A model whose forward (or whose decoder's) has an
    argument ``memory`` gets a :class:`~fairseq_adaptive.modules.transformer_xl.memory.SegmentMemory` in it, which lasts
    from segment to segment within one split; training and evaluation have one each. Other language models get the same
    segments.
    """

    def __init__(self, args, dictionary, output_dictionary=None, targets=None):
        super().__init__(args, dictionary, output_dictionary, targets)
        self.training, self.evaluation = SegmentStream(), SegmentStream()
        self.takes_memory = True
        self.longest = None  # segment that the model can read
        self.gathered = None

    @classmethod
    def setup_task(cls, args, **kwargs):
        check_ranges(args, cls)
        defaults = {field.name: field.default for field in fields(LanguageModelingConfig)}
        for name in WITHOUT_MEANING:
            if getattr(args, name, None) not in (None, defaults[name]):
                raise UsageError(
                    f"--{name.replace('_', '-')} has no meaning for --task segmented_language_modeling, "
                    "which reads the whole text in order; use --task language_modeling"
                )
        return super().setup_task(args, **kwargs)

    def build_model(self, args, from_checkpoint=False):
        model = super().build_model(args, from_checkpoint)
        self.takes_memory = takes_memory(model)
        self.longest = None if self.takes_memory else model.max_positions()
        return model

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        paths = utils.split_paths(self.args.data)
        path = os.path.join(paths[(epoch - 1) % len(paths)], split)
        sentences = data_utils.load_indexed_dataset(path, self.dictionary, self.args.dataset_impl, combine=combine)
        if sentences is None:
            raise FileNotFoundError(f"Dataset not found: {split} ({path})")
        self.datasets[split] = SegmentedDataset(
            sentences, sentences.sizes, self.dictionary, split, self.args.tokens_per_sample
        )

    def get_batch_iterator(
        self,
        dataset,
        max_tokens=None,
        max_sentences=None,
        num_shards=1,
        shard_id=0,
        num_workers=0,
        epoch=1,
        data_buffer_size=0,
        disable_iterator_cache=False,
        skip_remainder_batch=False,
        **kwargs,
    ):
        """The segments of worker ``shard_id``: the same streams, whether of one worker or of several.

        Raises:
            UsageError: no ``--batch-size``, more streams than tokens, or segments longer than the model reads
        """
        if not isinstance(dataset, SegmentedDataset):  # lines of fairseq-interactive
            return super().get_batch_iterator(
                dataset,
                max_tokens,
                max_sentences,
                num_shards=num_shards,
                shard_id=shard_id,
                num_workers=num_workers,
                epoch=epoch,
                data_buffer_size=data_buffer_size,
                skip_remainder_batch=skip_remainder_batch,
                **kwargs,
            )
        if max_sentences is None:
            raise UsageError(
                "--task segmented_language_modeling needs --batch-size, the number of streams that each "
                "worker reads side by side; --max-tokens does not say it"
            )
        key = (dataset, max_sentences, num_shards, shard_id)
        if key in self.dataset_to_epoch_iter and not disable_iterator_cache:
            return self.dataset_to_epoch_iter[key]
        dataset = dataset.with_rows(max_sentences * num_shards)
        length = min(dataset.tokens_per_sample, dataset.row_length)
        if self.longest is not None and length > self.longest:
            raise UsageError(
                f"segments of {length} tokens are longer than the {self.longest} positions that the model "
                f"reads; use --tokens-per-sample {self.longest} or less"
            )
        logger.info(
            f"{dataset.split}: {dataset.total:,} tokens in {dataset.rows} streams, of which {max_sentences} "
            f"here; {dataset.segments:,} segments of {length} tokens each"
        )
        segments = SegmentIterator(
            dataset,
            max_sentences,
            num_shards=num_shards,
            shard_id=shard_id,
            num_workers=num_workers,
            epoch=epoch,
            buffer_size=data_buffer_size,
            skip_remainder_batch=skip_remainder_batch,
        )
        if not disable_iterator_cache:
            self.dataset_to_epoch_iter[key] = segments
        return segments

    def eval_lm_dataloader(
        self,
        dataset,
        batch_size=None,
        num_shards=1,
        shard_id=0,
        num_workers=1,
        data_buffer_size=10,
        context_window=0,
        **kwargs,
    ):
        if context_window > 0:
            raise UsageError(
                "--context-window is for --task language_modeling; here the context is what the model "
                "remembers of the segments before: see its memory length"
            )
        if num_shards > 1:
            logger.warning(
                f"worker {shard_id} of {num_shards}: the perplexity below is that of its own streams; "
                "fairseq-validate gives that of all"
            )
        segments = self.get_batch_iterator(
            dataset,
            max_sentences=batch_size,
            num_shards=num_shards,
            shard_id=shard_id,
            num_workers=num_workers,
            data_buffer_size=data_buffer_size,
        ).next_epoch_itr(shuffle=False)
        return iterators.CountingIterator(map(self.evaluated, segments), total=len(segments))

    def evaluated(self, sample):
        """A batch as an evaluation in order gives it to the model: with the memory of the segments before it."""
        return self.evaluation.attach(sample) if self.takes_memory else sample

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        if self.takes_memory:
            sample = self.training.attach(sample, update_num)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def valid_step(self, sample, model, criterion):
        result = super().valid_step(self.evaluated(sample), model, criterion)
        if sample["segment"] and sample["segment"]["last"]:
            self.evaluation.memory.clear()  # so that training has its space
        return result

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        if "segment" in sample:
            raise UsageError(
                "fairseq-generate continues sentences: use --task language_modeling --sample-break-mode eos"
            )
        return super().inference_step(generator, models, sample, prefix_tokens, constraints)

    def gather_checkpoint(self):
        """Called on every worker before worker 0 saves (see ``compat``)."""
        self.gathered = self.training.gather()

    def get_checkpoint_dict(self):
        """What fairseq stores in ``extra_state`` of a checkpoint."""
        gathered, self.gathered = self.gathered, None
        return {type(self).__name__: gathered or {}}

    def set_checkpoint_dict(self, state_dict):
        self.training.load_state_dict(state_dict)
