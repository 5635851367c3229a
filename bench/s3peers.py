"""Read from one S3 server through cafs-mount, rclone mount and s3fs: many small files, then a large one; nothing is cached.

usage: s3peers.py [RUNS]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench), which has the tree
                            of start.py; needs root, rclone and s3fs

rclone (1.60) has no symbolic links, and both need an object a file, uploaded one by one: an image is not for them.  So the
trees here are plain files: scikit-learn's, without links, and 256 MB of random bytes.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from start import HERE, MOUNT, cold, compiled

SOURCES = "usr/lib/python3/dist-packages/sklearn"
SIZE = 256 << 20
SECRET = "testing"
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def read_small(point: str) -> None:
    subprocess.run(f"find {point}/small -type f -print0 | xargs -0 cat > /dev/null", shell=True, check=True)


def read_large(point: str) -> None:
    subprocess.run(["dd", f"if={point}/large", "of=/dev/null", "bs=1M", "status=none"], check=True)


def timed(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def wait_for(point: str) -> None:
    while not os.path.ismount(point):
        time.sleep(0.002)


def cafs(base: str, point: str, _port: int) -> None:
    shutil.rmtree(f"{base}/cache", ignore_errors=True)
    subprocess.run([MOUNT, "--store", "s3://cafs/store", "bench:1", point], check=True)


def rclone(base: str, point: str, _port: int) -> None:
    shutil.rmtree(f"{base}/rclone", ignore_errors=True)
    cache = ["--vfs-cache-mode", "full", "--cache-dir", f"{base}/rclone", "--read-only", "--dir-cache-time", "1h"]
    subprocess.run(["rclone", "mount", "--daemon", *cache, "bench:plain", point], check=True)
    wait_for(point)


def s3fs(base: str, point: str, port: int) -> None:
    shutil.rmtree(f"{base}/s3fs", ignore_errors=True)
    options = f"url=http://127.0.0.1:{port},use_path_request_style,passwd_file={base}/password,use_cache={base}/s3fs,ro"
    subprocess.run(["s3fs", "plain", point, "-o", options], check=True)
    wait_for(point)


def one_round(base: str, port: int) -> dict[str, float]:
    found = {}
    point = f"{base}/mnt"
    for mount in (cafs, rclone, s3fs):
        cold()
        try:
            found[f"{mount.__name__}: mount"] = timed(lambda mount=mount: mount(base, point, port))
            found[f"{mount.__name__}: small files"] = timed(lambda: read_small(point))
            found[f"{mount.__name__}: 256 MB"] = timed(lambda: read_large(point))
        finally:
            command = [MOUNT, "--unmount", point] if mount is cafs else ["umount", point]
            while subprocess.run(command, capture_output=mount is not cafs).returncode and os.path.ismount(point):
                time.sleep(0.1)
    return found


def prepare(base: str, port: int) -> None:
    os.makedirs(f"{base}/tree")
    os.makedirs(f"{base}/mnt")
    shutil.copytree(
        f"{os.path.dirname(base)}/tree/{SOURCES}",
        f"{base}/tree/small",
        ignore=lambda top, names: [n for n in names if os.path.islink(f"{top}/{n}")],
    )
    with open(f"{base}/tree/large", "wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    with open(os.open(f"{base}/password", os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(f"{SECRET}:{SECRET}")
    url = f"http://127.0.0.1:{port}"
    for name, value in (
        ("TYPE", "s3"),
        ("PROVIDER", "Other"),
        ("ENDPOINT", url),
        ("ACCESS_KEY_ID", SECRET),
        ("SECRET_ACCESS_KEY", SECRET),
    ):
        os.environ[f"RCLONE_CONFIG_BENCH_{name}"] = value
    os.environ.update(AWS_ACCESS_KEY_ID=SECRET, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1")
    os.environ.update(AWS_ENDPOINT_URL=url, CAFS_CACHE=f"{base}/cache", CAFS_RUN=f"{base}/run")
    os.environ.pop("AWS_CA_BUNDLE", None)  # rclone takes none for a server without TLS
    import boto3

    for bucket in ("cafs", "plain"):
        boto3.client("s3").create_bucket(Bucket=bucket)
    subprocess.run(["rclone", "copy", "-q", f"{base}/tree", "bench:plain"], check=True)
    command = os.path.join(HERE, "..", ".venv", "bin", "cafs-index")
    subprocess.run(
        [command, "create", "--store", "s3://cafs/store", "-t", "bench:1", f"{base}/tree"],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def main() -> None:
    compiled()
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "s3peers")
    if os.path.ismount(f"{base}/mnt"):
        sys.exit(f"{base}/mnt is mounted")
    shutil.rmtree(base, ignore_errors=True)
    os.makedirs(base)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        port = int(server.stdout.readline())
        prepare(base, port)
        rounds = [one_round(base, port) for _ in range(int(sys.argv[1]) if sys.argv[1:] else 3)]
        server.stdin.close()
    for name in rounds[0]:
        print(f"{name}\t{statistics.median(one[name] for one in rounds):.3f} s")


if __name__ == "__main__":
    main()
