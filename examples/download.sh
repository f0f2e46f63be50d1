# What the scripts share that download: archives that are resumed and checked, and whole or not there.
# Sourced behind common.sh; uses of the script: die MESSAGE, usage, and for fetch $raw (folder of the archives), $sums ("CHECKSUM  NAME" lines,
# SHA-256 or MD5), $checksums (the file they were read from, or empty) and $mirror (a URL, or empty).

download_options() { # [--mirror URL] [--checksums FILE]: sets $mirror, $checksums and $sums, which are $published without
  mirror='' checksums='' sums=$published
  while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1 in
      --mirror) mirror=${2%/} ;;
      --checksums) checksums=$2 ;;
      *) usage ;;
    esac
    shift 2
  done
  if [ -n "$checksums" ]; then
    [ -r "$checksums" ] || die "cannot read the checksums in $checksums"
    sums=$(< "$checksums")
  fi
  command -v curl > /dev/null || die "the command curl is missing; install it first"
}

matches() { # FILE CHECKSUM
  local tool=sha256sum
  [ ${#2} -ne 32 ] || tool=md5sum
  [ "$("$tool" < "$1" | cut -d ' ' -f 1)" = "$2" ]
}

fetch() { # NAME URL: an archive has its own name only once it is whole
  local file=$raw/$1 url=$2 sum shown=(--silent --show-error)
  [ ! -t 2 ] || shown=(--progress-bar)
  [ -z "$mirror" ] || url=$mirror/$1
  sum=$(awk -v name="$1" '$2 == name || $2 == "*" name { print $1; exit }' <<< "$sums")
  [ -n "$sum" ] || die "$checksums has no checksum for $1"
  if [ -e "$file" ]; then
    matches "$file" "$sum" || die "$file is damaged or another version: its checksum is not $sum; move it away"
    return
  fi
  if [ ! -e "$file.part" ] || ! matches "$file.part" "$sum"; then
    echo "downloading $url" >&2
    curl --fail --location "${shown[@]}" --connect-timeout 30 --retry 5 --continue-at - \
      --output "$file.part" "$url" ||
      die "cannot download $url; run this again to go on (or, if it cannot be resumed, remove $file.part first)"
    matches "$file.part" "$sum" || {
      mv "$file.part" "$file.damaged"
      die "what came from $url is damaged or another version: its checksum is not $sum; kept as $file.damaged"
    }
  fi
  mv "$file.part" "$file"
}
