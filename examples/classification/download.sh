#!/usr/bin/env bash
# Downloads a data set and unpacks it into RAW, where texts.py reads it.
#
# usage: bash download.sh TASK RAW [options]
#   TASK              CoLA, SST-2, MRPC, STS-B, QQP, MNLI (with the diagnostic set AX), QNLI, RTE, WNLI; 20news, yelp,
#                     imdb; glue for GLUE's nine
#   RAW               folder of the archives; one that is there is not downloaded again, an interrupted one is resumed
#   --mirror URL      download from URL/NAME
#   --checksums FILE  "CHECKSUM  NAME" lines (SHA-256 or MD5) in place of the published ones, for other archives of the
#                     same layout
set -euo pipefail

# SHA-256 as public data loaders record them. MRPC's home has an installer for Windows only; SentEval serves its text.
# The home of Yelp's reviews by stars (Zhang et al., 2015) is a shared drive without direct links; fast.ai serves them.
published='f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff  CoLA.zip
d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa  SST-2.zip
60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89  msr_paraphrase_train.txt
a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784  msr_paraphrase_test.txt
971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7  mrpc_dev_ids.tsv
e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85  STS-B.zip
40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0  QQP-clean.zip
e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633  MNLI.zip
0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd  AX.tsv
e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5  QNLIv2.zip
6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee  RTE.zip
ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46  WNLI.zip
8f1b2514ca22a5ade8fbb9cfa5727df95fa587f4c87b786e15c759fa66d95610  20news-bydate.tar.gz
c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe  aclImdb_v1.tar.gz
56006b0a17a370f1e366504b1f2c3e3754e4a3dda17d3e718a885c552869a559  yelp_review_full_csv.tgz'
glue=https://dl.fbaipublicfiles.com/glue/data
senteval=https://dl.fbaipublicfiles.com/senteval/senteval_data

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
die() { echo "download: $*" >&2; exit 1; }
. "$(dirname "${BASH_SOURCE[0]}")/../download.sh"

[ $# -ge 2 ] || usage
task=$1 raw=$2
paths raw
download_options "${@:3}"

unpack() { # ARCHIVE FOLDER [MEMBER...]: FOLDER of the archive has its name only once it is whole
  local archive=$1 folder=$2 part
  shift 2
  [ ! -e "$raw/$folder" ] || return 0
  echo "unpacking $raw/$archive" >&2
  part=$(mktemp -d "$raw/.unpack.XXXXXX")
  if ! python3 -c 'import sys, tarfile, zipfile
archive, folder, *members = sys.argv[1:]
try:
    if archive.endswith(".zip"):
        zipfile.ZipFile(archive).extractall(folder, members or None)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, [file.getmember(each) for each in members] or None, filter="data")
except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
    sys.exit(f"download: {archive}: {error}")' "$raw/$archive" "$part" "$@"; then
    rm -rf "$part"
    exit 1
  fi
  [ -e "$part/$folder" ] || { rm -rf "$part"; die "$raw/$archive has no folder $folder"; }
  mv "$part/$folder" "$raw/$folder"
  rm -rf "$part"
}

get() { # TASK
  local part
  case $1 in
    CoLA | SST-2 | STS-B | RTE | WNLI) get_glue "$1" "$1.zip" train dev test ;;
    QQP) get_glue QQP QQP-clean.zip train dev test ;;
    QNLI) get_glue QNLI QNLIv2.zip train dev test ;;
    MNLI)
      fetch AX.tsv "$glue/AX.tsv"
      get_glue MNLI MNLI.zip train dev_matched dev_mismatched test_matched test_mismatched
      cp "$raw/AX.tsv" "$raw/MNLI/AX.tsv" ;;
    MRPC)
      fetch mrpc_dev_ids.tsv "$glue/mrpc_dev_ids.tsv"
      for part in train test; do fetch "msr_paraphrase_$part.txt" "$senteval/msr_paraphrase_$part.txt"; done
      mkdir -p "$raw/MRPC"
      cp "$raw/mrpc_dev_ids.tsv" "$raw/msr_paraphrase_train.txt" "$raw/msr_paraphrase_test.txt" "$raw/MRPC" ;;
    20news)
      fetch 20news-bydate.tar.gz http://qwone.com/~jason/20Newsgroups/20news-bydate.tar.gz
      unpack 20news-bydate.tar.gz 20news-bydate-train
      unpack 20news-bydate.tar.gz 20news-bydate-test ;;
    imdb)
      fetch aclImdb_v1.tar.gz https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz
      unpack aclImdb_v1.tar.gz aclImdb ;;
    yelp)
      fetch yelp_review_full_csv.tgz https://s3.amazonaws.com/fast-ai-nlp/yelp_review_full_csv.tgz
      unpack yelp_review_full_csv.tgz yelp_review_full_csv ;;
    *) die "there is no TASK '$1': see bash download.sh" ;;
  esac
}

get_glue() { # TASK ARCHIVE SPLIT...
  local task=$1 archive=$2 split members=()
  shift 2
  for split in "$@"; do members+=("$task/$split.tsv"); done
  fetch "$archive" "$glue/$archive"
  unpack "$archive" "$task" "${members[@]}"
}

mkdir -p "$raw"
case $task in
  glue) for each in CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE WNLI; do get "$each"; done ;;
  *) get "$task" ;;
esac
