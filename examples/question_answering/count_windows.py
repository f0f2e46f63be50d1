#!/usr/bin/env python3
"""Checks train.json and valid.json as training would, and prints how many windows of 384 tokens train.json has."""

from fairseq_adaptive.command import run
from fairseq_adaptive.ranges import Parser
from fairseq_adaptive.tasks.question_answering import QuestionAnsweringConfig, QuestionAnsweringTask


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("folder", help="dict.txt, the vocabulary, train.json and valid.json")
    parser.add_argument("--cased", action="store_true", help="vocab.txt distinguishes upper and lower case")
    args = parser.parse_args()
    task = QuestionAnsweringTask.setup_task(QuestionAnsweringConfig(data=args.folder, cased=args.cased, seed=1))
    for split in ("valid", "train"):
        task.load_dataset(split)
    print(len(task.dataset("train")))


if __name__ == "__main__":
    run(main)
