"""First process of a virtual node: `node_init.py NAME ISOLATION HOSTS_FILE SLURMD...`, run as a file.

It outlives slurmd, so that a slurmd that dies alone leaves its jobs running, as on a real node; orphans become its
children. A line on standard input starts slurmd (again); the end of standard input ends the node, so that a test that
was killed leaves nothing behind.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def main(name: str, isolation: str, hosts: str, *slurmd: str) -> None:
    """Makes this process the node, then starts slurmd whenever it's told to."""
    if isolation == "none":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    else:
        socket.sethostname(name)
        for options in (["-t", "proc", "proc", "/proc"], ["-t", "tmpfs", "tmpfs", "/dev/shm"],
                        ["--bind", hosts, "/etc/hosts"]):
            subprocess.run(["mount", *options], check=True)
    signal.signal(signal.SIGCHLD, reap)
    for _ in sys.stdin:
        subprocess.Popen(slurmd, stdin=subprocess.DEVNULL)
    kill_children()


def reap(*_) -> None:
    """Collects children that have ended; the handler runs again for each later one."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def kill_children() -> None:
    """Kills all that run below this process; in a pid namespace the kernel does so anyway."""
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for child in children:  # grandchildren become children by and by
            os.kill(int(child), signal.SIGKILL)
        time.sleep(0.02)  # `reap` runs meanwhile


if __name__ == "__main__":
    main(*sys.argv[1:])
