"""Workers of a comparison end with the process that started them."""

import os
import subprocess
import sys
import time

CHILD = """
import os, subprocess, sys
watch = '''
import sys
from torchrec_compress.train.compare.worker import _end_with
print("up", flush=True)
_end_with(int(sys.argv[1]))
'''
command = [sys.executable, "-W", "ignore", "-c", watch, str(os.getpid())]
worker = subprocess.Popen(command, stdout=subprocess.PIPE)
worker.stdout.readline()
print(worker.pid, flush=True)
worker.wait()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert alive(worker)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)
