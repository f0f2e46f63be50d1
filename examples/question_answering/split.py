#!/usr/bin/env python3
"""Splits a file in the format of SQuAD by article, so that no text is in both parts."""

import json
import random

from fairseq_adaptive.command import run
from fairseq_adaptive.data.squad import read_squad
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, require_new, whole_file
from fairseq_adaptive.ranges import SEED, Parser, Range


def count(articles):
    return sum(len(paragraph["qas"]) for article in articles for paragraph in article["paragraphs"])


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("file", help="JSON in the format of SQuAD v1.1 or v2.0")
    parser.add_argument("train", help="must not exist")
    parser.add_argument("valid", help="must not exist")
    parser.add_argument(
        "--valid-share",
        type=Range(float, 0, 1, above=True, below=True),
        default=0.1,
        help="of the questions, more or less (default: %(default)s)",
    )
    parser.add_argument("--seed", type=SEED, default=1, help="of the choice of articles (default: %(default)s)")
    args = parser.parse_args()

    for path in (args.train, args.valid):
        require_new(path)
    read_squad(args.file)  # refuses what training would refuse
    content = read_json(args.file)
    titled = {}
    for number, article in enumerate(content["data"]):
        titled.setdefault(article.get("title", number), []).append(article)
    if len(titled) < 2:
        raise UsageError(f"{args.file} has one article only, which cannot be split")
    titles = list(titled)
    random.Random(args.seed).shuffle(titles)
    wanted, valid = args.valid_share * count(content["data"]), titled[titles.pop()]
    while len(titles) > 1 and count(valid) < wanted:
        valid = valid + titled[titles.pop()]
    train = [article for title in titles for article in titled[title]]
    for path, articles in ((args.train, train), (args.valid, valid)):
        with whole_file(path) as part, open(part, "w", encoding="utf-8") as file:
            json.dump({**content, "data": articles}, file, ensure_ascii=False)
        print(f"{path}: {len(articles)} articles, {count(articles)} questions")


if __name__ == "__main__":
    run(main)
