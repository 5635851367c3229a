#!/bin/sh
# Install the Debian packages that the toolkit, its tests and its demo need; does nothing if all are there.
# gcc, pkg-config, libfuse3-dev and python3-dev build pyfuse3; the rest are the programs we run or compare with.
set -eu
packages="python3 python3-venv python3-dev gcc pkg-config libfuse3-dev fuse3 runc debootstrap busybox-static attr acl libcap2-bin procps skopeo umoci docker-registry libarchive-tools erofs-utils nftables iptables iproute2 curl tini uidmap git make openssh-server golang-github-containers-common jq"
missing=
for package in $packages; do
	status=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true)
	[ "$status" = "ii " ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
	echo "packages.sh: cannot install without root; run: apt-get install$missing" >&2
	exit 8
fi
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # so that no server is started: tests start their own
apt-get update -qq
# shellcheck disable=SC2086 # a list of words
apt-get install -y -qq --no-install-recommends $missing
