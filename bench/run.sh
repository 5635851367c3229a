#!/bin/sh
# Time `crun run IMAGE true` on a warm mount beside runc alone on a plain directory, and the start of `cafs-index --help`
# beside `python -c 'import click'`.
# usage: run.sh TREE [RUNS]    as root
set -eu
tree=$1 runs=${2:-9}
base=${CAFS_BENCH:-/var/tmp/cafs-bench}
export CAFS_STORE="$base/bench-store" CAFS_CACHE="$base/bench-cache" CAFS_RUN="$base/bench-run" CAFS_STATE="$base/bench-state"
python=$(sed -n '1s/^#!//p' "$(command -v cafs-index)")
now() { date +%s%N; }
timed() { a=$(now); "$@" >/dev/null; b=$(now); echo $((b - a)); }
medians() {
	awk -v what="$1" -v other="$2" '{ a[NR] = $1; b[NR] = $2; r[NR] = $2 / $1 }
		function median(v, i, j, t) { for (i in v) for (j in v) if (i + 0 < j + 0 && v[i] > v[j]) { t = v[i]; v[i] = v[j]; v[j] = t }
			return v[int((NR + 1) / 2)] }
		END { printf "%s %.3f s\t%s %.3f s\tratio %.2f\n", other, median(a) / 1e9, what, median(b) / 1e9, median(r) }'
}
cafs-index create "$tree" -t bench:1 -q >/dev/null
mkdir -p "$base/mnt" "$base/bundle"
(cd "$base/bundle" && rm -f config.json && runc spec)
sed -i 's/"terminal": true/"terminal": false/; s/"sh"/"true"/; s|"path": "rootfs"|"path": "'"$tree"'"|' "$base/bundle/config.json"
mkfifo "$base/keeper"
crun run --rm -i bench:1 cat <"$base/keeper" & # keeps the mount until the pipe is closed
exec 9>"$base/keeper"
trap 'exec 9>&-; wait; rm -rf "$CAFS_STORE" "$CAFS_CACHE" "$base/bundle" "$base/keeper"' EXIT
crun run --rm bench:1 true
for run in $(seq "$runs"); do
	echo "$(timed runc run -b "$base/bundle" "bench-$$-$run") $(timed crun run --rm bench:1 true)"
done | medians "crun true" "runc true"
for run in $(seq "$runs"); do
	echo "$(timed "$python" -c 'import click') $(timed cafs-index --help)"
done | medians "cafs-index --help" "import click"
