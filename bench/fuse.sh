#!/bin/sh
# Time a tree behind the fuse engine, warm, beside the same tree as plain files, in turns: `python3 -c 'import sklearn'` in a
# chroot, and `find -printf '%s'`.
# usage: fuse.sh TREE [RUNS]    as root; TREE has python3-sklearn; works in $CAFS_BENCH (default /var/tmp/cafs-bench)
set -eu
tree=$1 runs=${2:-7}
base=${CAFS_BENCH:-/var/tmp/cafs-bench}
export CAFS_STORE="$base/bench-store" CAFS_CACHE="$base/bench-cache" CAFS_RUN="$base/bench-run"
mkdir -p "$base/mnt"
cafs-index create "$tree" -t bench:1 -q >/dev/null
cafs-mount --engine fuse bench:1 "$base/mnt"
trap 'cafs-mount --unmount "$base/mnt"; rm -rf "$CAFS_STORE" "$CAFS_CACHE"' EXIT
now() { date +%s%N; }
start() { chroot "$1" /usr/bin/python3 -B -c 'import sklearn'; }
walk() { find "$1" -printf '%s\n' >/dev/null; }
timed() { a=$(now); "$@"; b=$(now); echo $((b - a)); }
for what in start walk; do
	$what "$tree" && $what "$base/mnt"
	$what "$base/mnt" # fetched, and in the page cache
	for run in $(seq "$runs"); do
		echo "$(timed $what "$tree") $(timed $what "$base/mnt")"
	done | awk -v what=$what '{ n[NR] = $1; f[NR] = $2; r[NR] = $2 / $1 }
		function median(a, i, j, t) { for (i in a) for (j in a) if (i + 0 < j + 0 && a[i] > a[j]) { t = a[i]; a[i] = a[j]; a[j] = t }
			return a[int((NR + 1) / 2)] }
		END { printf "%s\tnative %.3f s\tfuse %.3f s\tratio %.2f\n", what, median(n) / 1e9, median(f) / 1e9, median(r) }'
done
