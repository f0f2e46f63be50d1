#!/usr/bin/env bash
# Downloads SQuAD's training and development sets, where prepare.sh reads them.
#
# usage: bash download.sh VERSION RAW [options]
#   VERSION           1.1 (Rajpurkar et al., 2016) or 2.0 (2018), where some questions have no answer
#   RAW               folder of the files; one that is there is not downloaded again, an interrupted one is resumed
#   --mirror URL      download from URL/NAME
#   --checksums FILE  "CHECKSUM  NAME" lines (SHA-256 or MD5) in place of the published ones, for other files
set -euo pipefail

# SHA-256 as public data loaders record them
published='3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955  train-v1.1.json
95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9  dev-v1.1.json
68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002  train-v2.0.json
80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8  dev-v2.0.json'
home=https://rajpurkar.github.io/SQuAD-explorer/dataset

. "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
die() { echo "download: $*" >&2; exit 1; }
. "$(dirname "${BASH_SOURCE[0]}")/../download.sh"

[ $# -ge 2 ] || usage
version=$1 raw=$2
paths raw
download_options "${@:3}"
case $version in
  1.1 | 2.0) ;;
  *) die "VERSION is 1.1 or 2.0, not '$version'" ;;
esac
mkdir -p "$raw"
for split in train dev; do fetch "$split-v$version.json" "$home/$split-v$version.json"; done
