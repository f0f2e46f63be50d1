#!/usr/bin/env python3
"""Writes the 1,797 handwritten digits of scikit-learn (8 x 8 pixels) as train.npz, valid.npz and test.npz."""

import os

import numpy as np
from sklearn.datasets import load_digits

from fairseq_adaptive.command import run
from fairseq_adaptive.files import require_new, whole_folder
from fairseq_adaptive.ranges import Parser

SPLITS = {"train": (0, 1397), "valid": (1397, 1597), "test": (1597, 1797)}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("folder", help="to write to; must not exist")
    args = parser.parse_args()
    require_new(args.folder)
    digits = load_digits()
    images = (digits.images * 15.9375).astype(np.uint8)  # 0 to 16 -> 0 to 255
    with whole_folder(args.folder) as made:
        for split, (first, last) in SPLITS.items():
            np.savez(os.path.join(made, f"{split}.npz"), images=images[first:last], labels=digits.target[first:last])
    for split, (first, last) in SPLITS.items():
        print(f"{split}: {last - first} digits")


if __name__ == "__main__":
    run(main)
