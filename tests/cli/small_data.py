"""Data as small as they can be, of each kind that commands of pages read, made when they are first asked for.

A program: ``small_data.py KIND PATH ...`` links them to names; PAGE_DATA is the folder where they are kept.
"""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

SPLITS = ("train", "valid", "test")
WORDS = "good bad film was the a story , . it never works plot".split()
_LETTERS = [piece for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for piece in (letter, f"##{letter}")]
_MARKS = "'\"?!:;-()#/@"
PIECES = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *_LETTERS, *_MARKS]))


def preprocess(out, *flags):
    subprocess.run(["fairseq-preprocess", "--destdir", out, "--workers", "1", *flags], check=True, capture_output=True)


def prefixes(folder, ending):
    return [word for split in SPLITS for word in (f"--{split}pref", f"{folder}/{split}{ending}")]


def sentences(seed, count, words=(3, 9), kinds=80):
    """Sentences of made-up words, whose letters differ enough for some hundred pieces."""
    rng = random.Random(7)
    known = ["".join(rng.choices("abcdefghiklmnoprstuw", k=rng.randint(2, 7))) for _ in range(kinds)]
    rng = random.Random(seed)
    return [" ".join(rng.choices(known, k=rng.randint(*words))).capitalize() + "." for _ in range(count)]


def texts(folder):
    """train, valid and test of running text, with empty lines between documents."""
    folder.mkdir()
    for seed, (split, count) in enumerate(zip(SPLITS, (400, 40, 40))):
        lines = sentences(seed, count, kinds=300)
        for place in range(6, count, 7):
            lines[place] = ""
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


def parallel(folder, source, target, counts=(16, 12, 12)):
    folder.mkdir()
    for seed, (split, count) in enumerate(zip(SPLITS, counts)):
        lines = sentences(seed, count)
        (folder / f"{split}.{source}").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.{target}").write_text("\n".join(line[::-1] for line in lines) + "\n")


def translation(folder, source="src", target="tgt"):
    """Binarised, with one dictionary."""
    text = folder.with_name(folder.name + ".text")
    parallel(text, source, target, (30, 8, 8))
    preprocess(folder, "-s", source, "-t", target, "--joined-dictionary", *prefixes(text, ""))


def aligned(folder):
    """Parallel text of German and English, and which words belong together."""
    parallel(folder, "de", "en", (30, 8, 8))
    for split in SPLITS:
        lines = (folder / f"{split}.de").read_text().splitlines()
        (folder / f"{split}.align").write_text(
            "\n".join(" ".join(f"{at}-{at}" for at in range(len(line.split()))) for line in lines) + "\n"
        )


def language_modeling(folder):
    text = folder.with_name(folder.name + ".text")
    text.mkdir()
    rng = random.Random(1)
    for split, count in zip(SPLITS, (12, 4, 4)):
        lines = (" ".join(rng.choices([f"w{number}" for number in range(40)], k=12)) for _ in range(count))
        (text / f"{split}.txt").write_text("\n".join(lines) + "\n")
    preprocess(folder, "--only-source", *prefixes(text, ".txt"))


def sentence_prediction(folder, classes="2"):
    """Binarised texts, whose label is their first word, and the vocabulary of word pieces."""
    text, rng = folder.with_name(folder.name + ".text"), random.Random(1)
    text.mkdir()
    labels = [f"l{number}" for number in range(int(classes))]
    for split, count in zip(SPLITS, (max(16, len(labels)), 8, 8)):
        chosen = [number % len(labels) for number in range(count)]
        lines = [" ".join([WORDS[number % 8], *rng.choices(WORDS, k=rng.randint(3, 7))]) for number in chosen]
        (text / f"{split}.label").write_text("".join(f"{labels[number]}\n" for number in chosen))
        (text / f"{split}.input0").write_text("\n".join(lines) + "\n")
    (text / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in ["<mask>", *PIECES[5:]]))
    preprocess(folder / "label", "--only-source", *prefixes(text, ".label"))
    preprocess(folder / "input0", "--only-source", *prefixes(text, ".input0"), "--srcdict", text / "dict.txt")
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")


def labelled(folder):
    """A folder of texts with labels, as own.sh and prepare.sh read it."""
    folder.mkdir()
    rng = random.Random(1)
    for split, count in (("train", 60), ("dev", 8), ("test", 8)):
        lines = (
            f"{number % 2}\t{['bad', 'good'][number % 2]} {' '.join(rng.choices(WORDS, k=5))}"
            for number in range(count)
        )
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


def image_classification(folder, more=None):
    """Files as (Fashion-)MNIST has: 28 x 28, ten classes; with ``valid`` a split of that name, too."""
    import numpy as np

    folder.mkdir()
    rng = np.random.default_rng(1)
    for split, count in (("train", 40), ("t10k", 12), *([(more, 8)] if more else [])):
        for name, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28))),
            ("labels-idx1", np.arange(count) % 10),
        ):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{split}-{name}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())


def image_folders(folder):
    """Pictures as ImageNet has, of two classes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(1)
    for split, count in (("train", 4), ("valid", 2)):
        for number, name in enumerate(("n01440764", "n01443537")):
            (folder / split / name).mkdir(parents=True)
            for each in range(count):
                noise = rng.integers(0, 100, (40, 48, 3)) + (0, 150 * number, 0)
                Image.fromarray(noise.astype(np.uint8)).save(folder / split / name / f"{name}_{each}.JPEG")


def questions(file, size="12", start=0):
    """Questions and answers as SQuAD v2.0 has them; every third has no answer."""
    paragraphs = []
    for number in range(start, start + int(size)):
        context = f"the story {number} was good . the plot never works ."
        answers = [] if number % 3 == 2 else [{"text": "good", "answer_start": context.index("good")}]
        qas = [{"id": f"q{number}", "question": "was it good ?", "answers": answers, "is_impossible": not answers}]
        paragraphs.append({"title": f"t{number % 5}", "paragraphs": [{"context": context, "qas": qas}]})
    file.write_text(json.dumps({"version": "v2.0", "data": paragraphs}))


def squad_archives(folder):
    folder.mkdir()
    questions(folder / "train-v2.0.json")
    questions(folder / "dev-v2.0.json", "6", 100)
    write_sums(folder)


def bert(folder, hidden="16", layers="2"):
    """A published encoder, with the pieces of whatever text."""
    import torch

    hidden, layers, inner = int(hidden), int(layers), 32
    config = {
        "model_type": "bert",
        "vocab_size": len(PIECES),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "hidden_act": "gelu",
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    }
    torch.manual_seed(1)
    shapes = {
        f"embeddings.{name}_embeddings": (size, hidden)
        for name, size in (("word", len(PIECES)), ("position", 512), ("token_type", 2))
    }
    norms, linears = ["embeddings.LayerNorm"], {"pooler.dense": (hidden, hidden)}
    for number in range(layers):
        layer = f"encoder.layer.{number}."
        for name in ("query", "key", "value"):
            linears[f"{layer}attention.self.{name}"] = (hidden, hidden)
        linears |= {
            f"{layer}attention.output.dense": (hidden, hidden),
            f"{layer}intermediate.dense": (inner, hidden),
            f"{layer}output.dense": (hidden, inner),
        }
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    weights = {f"{name}.weight": 0.1 * torch.randn(shape) for name, shape in (shapes | linears).items()}
    weights |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in linears.items()}
    weights |= {f"{name}.weight": torch.ones(hidden) for name in norms}
    weights |= {f"{name}.bias": torch.zeros(hidden) for name in norms}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    torch.save(weights, folder / "pytorch_model.bin")


def transfo_xl(folder):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from interop.original_transfo_xl import BASE, random_weights, write_original

    write_original(folder, {**BASE, "n_layer": 2}, random_weights({**BASE, "n_layer": 2}))


def wikitext_archives(folder):
    import zipfile

    folder.mkdir()
    with zipfile.ZipFile(folder / "wikitext-103-v1.zip", "w") as archive:
        for seed, split in enumerate(SPLITS):
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", " \n " + " \n ".join(sentences(seed, 30)) + " \n")
    write_sums(folder)


def wmt14_archives(folder):
    from cli.wmt14 import tiny_archives

    folder.mkdir()
    tiny_archives(folder)
    write_sums(folder)


def text_archives(folder):
    """GLUE's and 20 Newsgroups', of the layout and the names of the real ones."""
    from cli.glue import write_glue

    folder.mkdir()
    write_glue(folder)
    rng = random.Random(1)
    with tarfile.open(folder / "20news-bydate.tar.gz", "w:gz") as archive:
        for split, count in (("train", 3), ("test", 1)):
            for group in range(20):
                for number in range(count):
                    content = f"Subject: x\n\ngroup {group} {' '.join(rng.choices(WORDS, k=8))}\n".encode("latin-1")
                    info = tarfile.TarInfo(f"20news-bydate-{split}/group.{group:02}/{number}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    write_sums(folder)


def write_sums(folder):
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SUMS").write_text("".join(lines))


def kept(kind):
    """Where data of a kind are: its name, and behind colons what its function is given."""
    folder = Path(os.environ["PAGE_DATA"], kind.replace(":", "-"))
    if not folder.exists():
        name, *given = kind.split(":")
        globals()[name](folder, *given)
    return folder


def link(kind, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(kept(kind))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for number in range(1, len(sys.argv), 2):
        link(*sys.argv[number : number + 2])
