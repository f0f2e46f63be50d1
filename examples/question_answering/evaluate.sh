#!/usr/bin/env bash
# Exact match, F1 and what skimming saved of a trained model, in fairseq-validate.
#
# usage: bash evaluate.sh DATA CHECKPOINT [fairseq-validate flags]
#   DATA        the OUT folder of prepare.sh
#   CHECKPOINT  one of train.sh
# scripts/answer_questions.py writes the answers to any file, in the official format, with the official figures.
set -euo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
data=$1 checkpoint=$2
shift 2
user_dir=$(cd "$(dirname "$0")/../../fairseq_adaptive" && pwd)

fairseq-validate "$data" --user-dir "$user_dir" --task question_answering --path "$checkpoint" --valid-subset valid \
  --batch-size 32 --required-batch-size-multiple 1 "$@"
