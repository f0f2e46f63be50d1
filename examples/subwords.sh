# What the scripts share that make subwords of parallel text.
# Sourced behind common.sh; uses of the script: die MESSAGE, $out, $source and $target (languages), $bpe (subword-nmt or
# sentencepiece), $merges and $workers.

spread() { # FILE COMMAND...: COMMAND on the lines of FILE, $workers parts at once, output in order
  local parts
  parts=$(mktemp -d "$out/parts.XXXXXX")
  split --number "l/$workers" --suffix-length 4 "$1" "$parts/"
  find "$parts" -type f -print0 | xargs -0 -P "$workers" -I PART \
    bash -c 'part=$1; shift; "$@" < "$part" > "$part.done"' - PART "${@:2}"
  cat "$parts"/*.done
  rm -r "$parts"
}

# Python's readers end a line at a carriage return (Common Crawl has some), which would shift one language.
without_control_characters() { LC_ALL=C tr '\000-\010\013-\037\177' ' '; }

same_length() { # PREFIX
  [ "$(wc -l < "$1.$source")" -eq "$(wc -l < "$1.$target")" ] ||
    die "$1.$source and $1.$target differ in their number of lines"
  [ -s "$1.$source" ] || die "$1.$source is empty"
}

tokenize() { spread "$out/$2.$1" sacremoses -q -l "$1" tokenize; } # LANG NAME

learn_bpe() {
  if [ "$bpe" = subword-nmt ]; then
    cat "$out"/train.tok.{"$source","$target"} | subword-nmt learn-bpe -s "$merges"
  else
    python3 -c 'import sys, sentencepiece
sentencepiece.SentencePieceTrainer.train(
    input=sys.argv[2:], vocab_size=int(sys.argv[1]), model_type="bpe", character_coverage=0.9999,
    input_sentence_size=5_000_000, shuffle_input_sentence=True, minloglevel=2, model_writer=sys.stdout.buffer)' \
      "$merges" "$out"/train.{"$source","$target"}
  fi
}

apply_bpe() { # LANG NAME
  if [ "$bpe" = subword-nmt ]; then
    spread "$out/$2.tok.$1" subword-nmt apply-bpe -c "$out/codes"
  else
    spread "$out/$2.$1" python3 -c 'import sys, sentencepiece
model = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
for line in sys.stdin:
    print(*model.encode(line.strip(), out_type=str))' "$out/codes"
  fi
}

clean() { # LANG: training pairs that are neither empty, nor longer than $max_length, nor one side $max_ratio times the other
  paste -d '\t' "$out"/train.bpe.{"$source","$target"} | awk -F '\t' -v max="$max_length" -v ratio="$max_ratio" \
    -v keep="$([ "$1" = "$source" ] && echo 1 || echo 2)" '{
      one = split($1, words, " "); other = split($2, words, " ")
      if (one && other && one <= max && other <= max && one <= ratio * other && other <= ratio * one) print $keep
    }'
}
