"""Handlers for the tests of functions; they run in a container."""

import asyncio
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time

begun = []
at_once = [0, 0]
lock = threading.Lock()


def setup():
    print("setup")
    if os.environ.get("HANG"):
        time.sleep(600)
    begun.append(time.time())


def teardown():
    print("teardown")
    if os.environ.get("SLOW_END"):
        time.sleep(3)


def echo(value):
    return value


def version(value):
    return os.environ.get("VERSION", "")


def say(value, context):
    print("it says", value)
    print("an error", value, file=sys.stderr)
    return {"id": context.id, "left_s": context.remaining_s(), "pid": os.getpid()}


class Odd(Exception):
    pass


def bad(value):
    raise Odd(f"no {value}")


def nap(value):
    time.sleep(value)
    return "slept"


def mark(value):
    """What it prints says how often it was done."""
    print("begun", value["name"])
    time.sleep(value["s"])
    print("done", value["name"])
    return value["name"]


def stubborn(value):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass


def die(value):
    os._exit(3)


def odd(value):
    if value == "nan":
        return float("nan")
    if value == "set":
        return {1, 2}
    if value == "exit":
        sys.exit(3)
    if value == "interrupt":
        raise KeyboardInterrupt
    if value == "deep":
        return odd("deep")
    if value == "fork":
        subprocess.Popen(["sleep", "60"])
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    if value == "flood":
        for _ in range(20000):
            print("x" * 100)
    return value


def together(many):
    """How many there were at once at most; each stays until there were so many."""
    with lock:
        at_once[0] += 1
        at_once[1] = max(at_once)
    while at_once[1] < many:
        time.sleep(0.01)
    time.sleep(0.1)  # for one more, which must not come
    with lock:
        at_once[0] -= 1
    return at_once[1]


async def later(value):
    at_once[0] += 1
    at_once[1] = max(at_once)
    await asyncio.sleep(value)
    at_once[0] -= 1
    return at_once[1]


async def alltogether(many):
    at_once[0] += 1
    at_once[1] = max(at_once)
    while at_once[1] < many:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    at_once[0] -= 1
    return at_once[1]


def gate(value):
    """Until the host's side says go."""
    while value and not os.path.exists("/run/cpool/out/go"):
        time.sleep(0.01)
    return "through"


def several(many):
    yield from range(many)


def pieces(many):
    yield from (b"x" for _ in range(many))


async def aseveral(many):
    for number in range(many):
        await asyncio.sleep(0)
        yield number


def size(value):
    return [type(value).__name__, len(value)]


def make(many):
    return b"x" * many if many >= 0 else "y" * -many


def secret(value):
    with open(os.environ["CPOOL_SECRETS"] + "/KEY") as file:
        return file.read()


def dice(value):
    return [random.random(), os.getpid()]


def who(value):
    return [os.environ["CPOOL_WORKER"], os.environ["CPOOL_JOB"]]


loaded = time.time()
if os.environ.get("THREAD"):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


def own(seconds):
    """What an instance has for itself."""
    import ctypes

    mine = "/tmp/mine"
    if not os.path.exists(mine):
        with open(mine, "w") as file:
            file.write(str(random.random()))
    time.sleep(seconds)
    libc = ctypes.CDLL(None)
    return {
        "pid": os.getpid(),
        "job": os.environ["CPOOL_JOB"],
        "tmp": open(mine).read(),
        "drawn": open(mine).read(),
        "loaded": loaded,
        "begun": len(begun),
        "can_mount": libc.mount(b"tmpfs", b"/mnt", b"tmpfs", 0, None) == 0,
    }


def threaded(seconds):
    time.sleep(seconds)
    return os.environ["CPOOL_JOB"]


held: list[bytes] = []


def leak_when_told(value):
    """Take more than there is, once the host's side says so."""
    print("begun", value["name"])
    while not os.path.exists("/run/cpool/out/go"):
        time.sleep(0.01)
    return leak(200)


def leak(value):
    """Keep that many MiB more from now on."""
    held.append(b"x" * (value << 20))
    return len(held)


def split(value):
    """In the child it comes back, raises or leaves; in the parent it says with what code the child has ended."""
    child = os.fork()
    if not child:
        if value == "raise":
            raise ValueError(value)
        sys.exit(3) if value == "exit" else None
        return "child"
    return os.waitpid(child, 0)[1] >> 8


async def asplit(value):
    return split(value)


def ended(value):
    """The exit code of a child that was terminated once it ran."""
    reads, writes = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=lambda: (os.write(writes, b"x"), time.sleep(600)))
    child.start()
    os.read(reads, 1)
    child.terminate()
    child.join(5)
    return child.exitcode


def hide(value):
    """Let go of the host, and live on."""
    os.closerange(3, 4096)
    time.sleep(600)
