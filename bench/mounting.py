"""Mount an image of 36,000 entries of which nothing is here, from a web server and from S3 (moto), 15 ms a request; how much
longer that takes than `python3 -c 'import click'`.

usage: mounting.py TREE [RUNS]    from the top of the project; works in $CAFS_BENCH (default /var/tmp/cafs-bench); needs root
"""

import os
import shutil
import statistics
import subprocess
import sys
import time

from s3peers import SECRET, SERVER
from start import DELAY_S, HERE, Mounted, compiled

from cafs.indexing import Options, create_image

sys.path.insert(0, os.path.dirname(HERE))
from tests.faultproxy import Proxy


def click() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import click"], check=True)
    return time.perf_counter() - began


def one_round(base: str, stores: dict[str, str]) -> dict[str, float]:
    found = {"import click": click()}
    for name, store in stores.items():
        shutil.rmtree(f"{base}/cache", ignore_errors=True)
        with Mounted(base, "kernel", store, f"{base}/cache", "--prefetch", "none") as mounted:
            found[name] = mounted.seconds
    return found


def main() -> None:
    compiled()
    base = os.path.join(os.environ.get("CAFS_BENCH", "/var/tmp/cafs-bench"), "mounting")
    shutil.rmtree(base, ignore_errors=True)
    os.makedirs(base)
    os.environ.update(AWS_ACCESS_KEY_ID=SECRET, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1")
    os.environ["CAFS_CACHE"] = f"{base}/cache"
    create_image(Options(sys.argv[1], jobs=2), f"{base}/store", "bench:1")
    web, moto = [sys.executable, os.path.join(HERE, "serve.py"), base, str(DELAY_S)], [sys.executable, "-c", SERVER]
    with (
        subprocess.Popen(web, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server,
        subprocess.Popen(moto, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as s3,
    ):
        port = int(s3.stdout.readline())
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        import boto3

        boto3.client("s3").create_bucket(Bucket="cafs")
        store = os.path.join(os.path.dirname(sys.executable), "cafs-store")
        subprocess.run([store, "push", "bench:1", "s3://cafs/store", "--store", f"{base}/store"], check=True)
        with Proxy(("127.0.0.1", port), DELAY_S) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            stores = {"web": f"http://127.0.0.1:{int(server.stdout.readline())}/store", "S3": "s3://cafs/store"}
            rounds = [one_round(base, stores) for _ in range(int(sys.argv[2]) if sys.argv[2:] else 7)]
    middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    for name, seconds in middle.items():
        print(f"{name}\t{seconds:.3f} s\t{seconds - middle['import click']:+.3f} s")


if __name__ == "__main__":
    main()
