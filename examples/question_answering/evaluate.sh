#!/usr/bin/env bash
# Exact match, F1 and what skimming saved of a trained model, in fairseq-validate.
#
# usage: bash evaluate.sh DATA CHECKPOINT [fairseq-validate flags]
#   DATA        the OUT folder of prepare.sh
#   CHECKPOINT  one of train.sh
# scripts/answer_questions.py writes the answers to any file, in the official format, with the official figures.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || usage
data=$1 checkpoint=$2
paths data checkpoint
shift 2

fairseq-validate "$data" --user-dir "$user_dir" --task question_answering --path "$checkpoint" --valid-subset valid \
  --batch-size 32 --required-batch-size-multiple 1 "$@"
