#!/bin/sh
# Time indexing beside copying and beside casync, in turns: `cp -a` + `sync -f`, `casync make` (where it is installed),
# `cafs-index create` into an empty store, and again.
# usage: create.sh TREE [RUNS]    works in $CAFS_BENCH (default /var/tmp/cafs-bench), on one disk
set -eu
tree=$1 runs=${2:-5}
base=${CAFS_BENCH:-/var/tmp/cafs-bench}
export CAFS_STORE="$base/bench-store" CAFS_CACHE="$base/bench-cache"
now() { date +%s%N; }
fresh() { rm -rf "$CAFS_STORE" "$CAFS_CACHE" "$base/copy" "$base/bench.castr" "$base/bench.caidx"; sync -f "$base"; }
mkdir -p "$base"
tar cf - -C "$tree" . | cat >/dev/null # the same page cache for all
for run in $(seq "$runs"); do
	fresh
	a=$(now); cp -a "$tree" "$base/copy"; sync -f "$base/copy"; b=$(now); copy=$((b - a))
	fresh
	casync=0
	if command -v casync >/dev/null; then
		a=$(now); casync make --store="$base/bench.castr" "$base/bench.caidx" "$tree" >/dev/null; b=$(now); casync=$((b - a))
		fresh
	fi
	a=$(now); /usr/bin/env time -f %M -o "$base/rss" cafs-index create "$tree" -t bench:1 >/dev/null; b=$(now); first=$((b - a))
	a=$(now); cafs-index create "$tree" -t bench:1 >/dev/null; b=$(now); second=$((b - a))
	awk -v c="$copy" -v k="$casync" -v f="$first" -v s="$second" -v m="$(cat "$base/rss")" 'BEGIN {
		printf "cp+sync %.2f s\tcasync %.2f s\tcreate %.2f s = %.2f x cp", c/1e9, k/1e9, f/1e9, f/c
		if (k) printf " = %.2f x casync", f/k
		printf ", %d MB\tagain %.2f s = %.2f x first\n", m/1024, s/1e9, s/f }'
done
fresh
