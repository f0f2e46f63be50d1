"""A patch of fairseq's task ``sentence_prediction``: what does not fit is told before work starts."""

import math
import os

import numpy as np

from fairseq_adaptive.errors import UsageError


def check_labels():
    """Classes, labels and lengths that do not fit the flags are refused with what would be right.

    fairseq fails in the middle of the first epoch, on a GPU with an assertion of CUDA that names no cause, or goes on:
    a label that is not in the dictionary becomes class -1, an empty one moves those behind it to other texts.
    """
    from fairseq.tasks.sentence_prediction import SentencePredictionTask as Task

    stock_setup, stock_load = Task.setup_task.__func__, Task.load_dataset

    def setup_task(cls, cfg, **kwargs):
        if cfg.num_classes < 1:
            raise UsageError("--num-classes is missing: how many labels there are, or 1 with --regression-target")
        task = stock_setup(cls, cfg, **kwargs)
        if not cfg.regression_target:
            dictionary = task.label_dictionary
            labels = [
                each
                for each in dictionary.symbols[dictionary.nspecial :]
                if each != "<mask>" and not each.startswith("madeupword")
            ]
            if len(labels) != cfg.num_classes:
                raise UsageError(
                    f"--num-classes {cfg.num_classes}, but {os.path.join(cfg.data, 'label', 'dict.txt')} "
                    f"has {len(labels)} labels ({_some(labels)}): set --num-classes {len(labels)}"
                )
        return task

    def load_dataset(self, split, combine=False, **kwargs):
        try:
            dataset = stock_load(self, split, combine=combine, **kwargs)
        except (AssertionError, ValueError) as error:  # a part that is missing, numbers that are none
            reason = "its texts and labels are not equally many" if "lengths must match" in str(error) else error
            raise UsageError(f"split {split} in {self.cfg.data}: {reason}") from error
        path = os.path.join(self.cfg.data, "label", split)
        if self.cfg.regression_target:
            _check_numbers(f"{path}.label")
        else:
            _check_classes(path, self.label_dictionary, combine)
        return dataset

    def filter_indices_by_size(self, indices, dataset, max_positions=None, ignore_invalid_inputs=False):
        ignored = dataset.filter_indices_by_size(indices, max_positions)[1]
        if len(ignored) and not ignore_invalid_inputs:
            raise UsageError(
                f"{len(ignored)} texts have more than --max-positions {max_positions} tokens, the longest "
                f"{max(map(dataset.size, ignored))}: cut them off with --shorten-method truncate, leave "
                "them out with --skip-invalid-size-inputs-valid-test, or raise --max-positions"
            )
        return super(Task, self).filter_indices_by_size(indices, dataset, max_positions, ignore_invalid_inputs)

    Task.setup_task, Task.load_dataset = classmethod(setup_task), load_dataset
    Task.filter_indices_by_size = filter_indices_by_size


def _some(labels):
    return ", ".join(labels[:5]) + (" ..." if len(labels) > 5 else "")


def _check_numbers(path):
    if not os.path.isfile(path):
        raise UsageError(f"there is no {path}: --regression-target reads numbers from it, one a line")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not all(math.isfinite(float(each)) for each in line.split()):
                raise UsageError(f"{path}, line {number}: {line.strip()} is no number to learn")


def _check_classes(path, dictionary, combine):
    from fairseq.data import data_utils

    labels = data_utils.load_indexed_dataset(path, dictionary, combine=combine)
    if labels is None:
        raise UsageError(f"there are no labels {path}.bin: binarise them with label/dict.txt")
    wrong = np.flatnonzero(np.asarray(labels.sizes) != 2)  # a label and </s>
    if len(wrong):
        raise UsageError(f"{path}: line {wrong[0] + 1} has {labels.sizes[wrong[0]] - 1} labels, not one")
    for number in range(len(labels)):
        if labels[number][0] < dictionary.nspecial:
            raise UsageError(
                f"{path}: the label in line {number + 1} is not in label/dict.txt, which has "
                f"{_some(dictionary.symbols[dictionary.nspecial : -1])}: that is made of the labels of "
                "the training data"
            )
