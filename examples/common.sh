# What all scripts of the examples share: help from their header, names that can be used, files that are whole or not there.
# Sourced before anything else; it ends the script itself for --help.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# of a clone the plug-in beside these scripts; a copy of them (fairseq-adaptive recipe) has the installed one
user_dir=$root/fairseq_adaptive
if [ ! -e "$user_dir/plugin.py" ]; then
  user_dir=$(python3 -c 'import os, importlib.util
print(os.path.dirname(importlib.util.find_spec("fairseq_adaptive").origin))' 2> /dev/null) || user_dir=fairseq_adaptive
fi

header() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }
usage() { header >&2; exit 2; }
die() { echo "error: $*" >&2; exit 1; }
case ${1:-} in -h | --help) header; exit 0 ;; esac

paths() { # VARIABLE...: each holds the name of a file or folder, which tools and fairseq must take for what it is
  local name
  for name in "$@"; do
    case ${!name} in
      '') die "the name of a file or folder is empty" ;;
      *[:,]* | *$'\n'*) die "'${!name}' cannot be used: fairseq splits names at colons and commas; choose another" ;;
      -*) printf -v "$name" './%s' "${!name}" ;;
    esac
  done
}

make() { # FILE COMMAND...: FILE has its name only once COMMAND has written all of it
  [ ! -e "$1" ] || return 0
  echo "making $1" >&2
  "${@:2}" > "$1.part"
  [ -s "$1.part" ] || die "nothing was written to $1"
  mv -- "$1.part" "$1"
}

language_pair() { # BIN SPLIT: sets $source and $target to the languages of binarised data
  local file pairs=()
  for file in "$1/$2".*-*.*.bin; do
    [ -e "$file" ] || continue
    file=${file##*/} file=${file#"$2."}
    [[ ! $file =~ ^([^.-]+)-([^.-]+)\.([^.]+)\.bin$ ]] || pairs+=("${BASH_REMATCH[1]}-${BASH_REMATCH[2]}")
  done
  [ ${#pairs[@]} -gt 0 ] || die "$1 has no binarised $2 set of two languages"
  [ "$(printf '%s\n' "${pairs[@]}" | sort -u | wc -l)" -eq 1 ] || die "$1 has more than one pair of languages"
  source=${pairs[0]%-*} target=${pairs[0]#*-}
}
