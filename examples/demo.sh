#!/bin/sh
# Index a Debian tree, mount it, run a Python program in a container, and show how little of it was read.
# usage: demo.sh [DIRECTORY]    without one, debootstrap makes a tree (kept for the next run)
set -eu
base=${CAFS_DEMO:-/var/tmp/cafs-demo}
tree=${1:-$base/debian-python}
export CAFS_STORE="$base/store" CAFS_CACHE="$base/cache"
point=$base/mnt
mkdir -p "$base" "$point" "$CAFS_CACHE/partial"
if [ ! -d "$tree" ] && [ "$tree" = "$base/debian-python" ]; then
	echo "making a Debian tree with python3 in $tree (once)" >&2
	rm -rf "$tree.new"
	debootstrap --variant=minbase --include=python3 bookworm "$tree.new" >"$base/debootstrap.log" 2>&1 ||
		{ tail -5 "$base/debootstrap.log" >&2; exit 1; }
	mv "$tree.new" "$tree"
fi
now() { date +%s%N; }
ms() { echo $((($2 - $1) / 1000000)); }
rm -rf "$CAFS_CACHE/data/.cafs-objects" "$CAFS_CACHE/partial" # so that what is read can be counted

a=$(now); cafs-index create "$tree" -t demo:1 >/dev/null; b=$(now); index_ms=$(ms "$a" "$b")
a=$(now); cafs-mount demo:1 "$point"; b=$(now); mount_ms=$(ms "$a" "$b")
trap 'cafs-mount --unmount "$point"' EXIT
a=$(now)
crun run --rm demo:1 python3 -c 'import json; print(json.dumps({"hello": "from a container"}))'
b=$(now); run_ms=$(ms "$a" "$b")
files=$(cafs-index ls --json demo:1 | grep -c '"type":"[fF]"')
bytes=$(cafs-index ls --json demo:1 | sed -n 's/.*"size":\([0-9]*\).*/\1/p' | awk '{s += $1} END {print s}')
# Files are there whole, or, if large, with holes for what was not read.
read_files=$(find "$CAFS_CACHE/data/.cafs-objects" "$CAFS_CACHE/partial" -type f ! -name '*.map' | wc -l)
read_bytes=$(find "$CAFS_CACHE/data/.cafs-objects" "$CAFS_CACHE/partial" -type f ! -name '*.map' -printf '%s %b\n' |
	awk '{s += $1 < 512 * $2 ? $1 : 512 * $2} END {print s}')
printf '\n%-22s %12s %14s\n' '' files bytes
printf '%-22s %12s %14s\n' 'in the image' "$files" "$bytes" 'fetched by that run' "$read_files" "$read_bytes"
echo
printf '%-22s %9s ms\n' 'to index' "$index_ms" 'to mount' "$mount_ms" 'to first output' "$run_ms"

cat >"$base/Dockerfile" <<'D'
FROM demo:1
RUN python3 -c 'print("built", 6 * 7)' | tee /built
CMD ["cat", "/built"]
D
cbuild -q -t demo:2 -f "$base/Dockerfile" "$base" >/dev/null
a=$(now); cbuild -q -t demo:2 -f "$base/Dockerfile" "$base" >/dev/null; b=$(now)
crun run --rm demo:2
printf '%-22s %9s ms\n' 'to build it again' "$(ms "$a" "$b")"
