#!/usr/bin/env python3
"""Writes the 1,797 handwritten digits of scikit-learn (8 x 8 pixels) as train.npz, valid.npz and test.npz."""

import argparse
import os

import numpy as np
from sklearn.datasets import load_digits

SPLITS = {"train": (0, 1397), "valid": (1397, 1597), "test": (1597, 1797)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", help="to write to; must not exist")
    args = parser.parse_args()
    if os.path.lexists(args.folder):
        parser.error(f"{args.folder} exists and is left as it is: name another folder, or remove it first")
    digits = load_digits()
    images = (digits.images * 15.9375).astype(np.uint8)  # 0 to 16 -> 0 to 255
    os.makedirs(args.folder)
    for split, (first, last) in SPLITS.items():
        np.savez(os.path.join(args.folder, f"{split}.npz"), images=images[first:last], labels=digits.target[first:last])
        print(f"{split}: {last - first} digits")


if __name__ == "__main__":
    main()
