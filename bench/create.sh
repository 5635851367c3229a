#!/bin/sh
# Time indexing beside copying: `cafs-index create` into an empty store, again, and `cp -a` + `sync -f`, in turns.
# usage: create.sh TREE [RUNS]    works in $CAFS_BENCH (default /var/tmp/cafs-bench), on one disk
set -eu
tree=$1 runs=${2:-5}
base=${CAFS_BENCH:-/var/tmp/cafs-bench}
export CAFS_STORE="$base/bench-store" CAFS_CACHE="$base/bench-cache"
now() { date +%s%N; }
sync -f "$base"
tar cf - -C "$tree" . >/dev/null # the same page cache for both sides
for run in $(seq "$runs"); do
	rm -rf "$CAFS_STORE" "$CAFS_CACHE" "$base/copy"
	sync -f "$base"
	a=$(now); cp -a "$tree" "$base/copy"; sync -f "$base/copy"; b=$(now); copy=$((b - a))
	rm -rf "$base/copy"
	sync -f "$base"
	a=$(now); cafs-index create "$tree" -t bench:1 >/dev/null; b=$(now); first=$((b - a))
	a=$(now); cafs-index create "$tree" -t bench:1 >/dev/null; b=$(now); second=$((b - a))
	awk -v c="$copy" -v f="$first" -v s="$second" 'BEGIN {
		printf "cp -a + sync %.2f s\tcreate %.2f s (%.2f of it)\tagain %.2f s (%.2f of the first)\n", c/1e9, f/1e9, f/c, s/1e9, s/f }'
done
rm -rf "$CAFS_STORE" "$CAFS_CACHE"
