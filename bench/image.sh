#!/bin/sh
# Time `cafs-index create docker-archive:` beside what a machine without a docker daemon does to run such an image: `skopeo copy`
# to an OCI layout and `umoci unpack`, in turns.
# usage: image.sh TREE [RUNS]    as root; works in $CAFS_BENCH (default /var/tmp/cafs-bench)
set -eu
tree=$1 runs=${2:-3}
base=${CAFS_BENCH:-/var/tmp/cafs-bench}
export CAFS_STORE="$base/bench-store" CAFS_CACHE="$base/bench-cache"
now() { date +%s%N; }
clean() { rm -rf "$CAFS_STORE" "$CAFS_CACHE" "$base/layout" "$base/bundle"; sync -f "$base"; }
clean
cafs-index create "$tree" -t bench:1 -q >/dev/null
cafs-index export bench:1 "docker-archive:$base/image.tar:bench:1"
trap 'clean; rm -f "$base/image.tar"' EXIT
for run in $(seq "$runs"); do
	clean
	a=$(now); skopeo copy -q "docker-archive:$base/image.tar" "oci:$base/layout:x"; umoci unpack --image "$base/layout:x" "$base/bundle" >/dev/null 2>&1; sync -f "$base"; b=$(now)
	theirs=$((b - a))
	clean
	a=$(now); cafs-index create "docker-archive:$base/image.tar" -t bench:2 -q >/dev/null; b=$(now)
	awk -v t="$theirs" -v o="$((b - a))" 'BEGIN { printf "skopeo + umoci %.1f s\tcreate %.1f s = %.2f\n", t/1e9, o/1e9, o/t }'
done
