#!/usr/bin/env bash
# Prepares raw documents for --task masked_lm_sop: learns a SentencePiece model and binarises the documents.
#
# usage: bash prepare.sh RAW OUT [options]
#   RAW                   folder with train.txt, valid.txt and test.txt: UTF-8, empty lines between documents. Best is a
#                         sentence a line, since documents are divided at ends of lines
#   OUT                   new folder; gets OUT/bin for fairseq-train and OUT/sentencepiece.model; if this script was
#                         interrupted, the same command goes on where it stopped
#   --sentencepiece N     how many pieces at most (default 30000)
#   --normalization NAME  of SentencePiece: nmt_nfkc_cf (default) makes text lower-case, nmt_nfkc leaves it
#   --workers N           processes (default: one per processor)
# Pieces and dictionary have the published layout: a trained model converts to it (scripts/convert_checkpoint.py).
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
die() { echo "prepare: $*" >&2; exit 1; }
. "$(dirname "${BASH_SOURCE[0]}")/../download.sh"

[ $# -ge 2 ] || usage
raw=$1 out=$2 pieces=30000 normalization=nmt_nfkc_cf workers=$(nproc)
paths raw out
shift 2
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage
  case $1 in
    --sentencepiece) pieces=$2 ;;
    --normalization) normalization=$2 ;;
    --workers) workers=$2 ;;
    *) usage ;;
  esac
  shift 2
done
for number in "$pieces" "$workers"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || die "--sentencepiece and --workers take a positive number, not '$number'"
done
case $normalization in
  nmt_nfkc_cf | nmt_nfkc) ;;
  *) die "--normalization is nmt_nfkc_cf or nmt_nfkc, not '$normalization'" ;;
esac
command -v fairseq-preprocess > /dev/null || die "the command fairseq-preprocess is missing; install it first"
for split in train valid test; do
  [ -s "$raw/$split.txt" ] || die "$raw/$split.txt is missing or empty"
  iconv -f UTF-8 -t UTF-8 "$raw/$split.txt" > /dev/null 2>&1 || die "$raw/$split.txt is not UTF-8 text"
done
grep -q '^[[:space:]]*$' "$raw/train.txt" || die "$raw/train.txt has no empty lines: write one between documents"

learn_pieces() {
  python3 -c 'import sys, sentencepiece
try:
    sentencepiece.SentencePieceTrainer.train(
        input=sys.argv[1], vocab_size=int(sys.argv[2]), normalization_rule_name=sys.argv[3], hard_vocab_limit=False,
        pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        character_coverage=0.99995, input_sentence_size=10_000_000, shuffle_input_sentence=True,
        max_sentence_length=100_000, minloglevel=2, model_writer=sys.stdout.buffer)
except RuntimeError as error:
    sys.exit("prepare: SentencePiece: " + " ".join(str(error).split()))' "$raw/train.txt" "$pieces" "$normalization"
}

list_pieces() { # as the published models number them, which scripts/convert_checkpoint.py relies on
  python3 -c 'import sys, sentencepiece
model = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
for piece in map(model.id_to_piece, range(4, len(model))):
    print("<mask>" if piece == "[MASK]" else piece, 1)' "$out/sentencepiece.model"
}

tokens() { # SPLIT
  python3 -c 'import itertools, sys, sentencepiece
model = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
with open(sys.argv[2], encoding="utf-8") as text:
    while lines := [line.strip() for line in itertools.islice(text, 10_000)]:
        for pieces in model.encode(lines, out_type=str, num_threads=int(sys.argv[3])):
            print(*pieces)' "$out/sentencepiece.model" "$raw/$1.txt" "$workers"
}

options="sentencepiece=$pieces normalization=$normalization"
[ ! -e "$out/bin" ] || die "$out/bin exists already; remove it or name another folder"
if [ -e "$out/options" ] && [ "$(< "$out/options")" != "$options" ]; then
  die "$out was begun with $(< "$out/options"); remove it or name another folder"
fi
mkdir -p "$out"
echo "$options" > "$out/options"
make "$out/sentencepiece.model" learn_pieces
make "$out/pieces.txt" list_pieces
for split in train valid test; do make "$out/$split.tok" tokens "$split"; done

rm -rf "$out/bin.part"
fairseq-preprocess --only-source --workers "$workers" --srcdict "$out/pieces.txt" --destdir "$out/bin.part" \
  --trainpref "$out/train.tok" --validpref "$out/valid.tok" --testpref "$out/test.tok"
mv "$out/bin.part" "$out/bin"
