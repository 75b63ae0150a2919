"""What a node measures of itself before ranks start on it: each check is a function from the request to facts.

A check that finds something broken raises `LaunchError` with what was tried and what to do. Limits aren't applied here
but by `preflight_judge`, which sees all nodes.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.local import count_cores, count_gpus
from megascale.errors import LaunchError

NODE_CHECK_MODULE = "megascale.train.node_check"
RANK_MODULE = b"megascale.train.rank"
VERSIONED = ("torch", "deepspeed", "megascale")
SHARED_MEMORY = Path("/dev/shm")
FOLDER_S = 10.0
"""A folder that doesn't answer within so many seconds is taken for dead: a hung NFS mount blocks for ever."""
TOKEN_WAIT_S = 3.0
"""NFS may show a new file of another node so much later."""
TOOL_S = 10.0
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        what: a noun for messages.
        run: gives facts by name; raises `LaunchError` or `OSError`.
        limit_s: seconds that it may take; the whole pre-flight has a limit besides.
        advice: what to do when it takes longer.
        is_information: its failure makes no node bad.
    """

    what: str
    run: Callable[[], dict]
    limit_s: float = math.inf
    advice: str = ""
    is_information: bool = False


def list_checks(request: dict, product_s: float) -> list[Check]:
    """The checks of a node; those of folders apart from each other, since any may hang."""
    run_folder, token_file = Path(request["run_folder"]), Path(request["token_file"])
    product = [NODE_CHECK_MODULE, str(request["gpus"])]
    mounted = "is its file system mounted and alive? try `stat` on it"
    return [
        Check("count of GPUs", lambda: {"gpus": count_gpus()}),
        Check("matrix product", lambda: check_product(product, product_s), product_s + 1),
        Check("memory", measure_memory),
        Check("free space of the run folder", lambda: measure_disk("run_disk", run_folder), FOLDER_S,
              mounted),
        Check("temporary folder", lambda: measure_disk("temporary_disk", Path(tempfile.gettempdir())), FOLDER_S,
              mounted),
        Check("/dev/shm", lambda: measure_disk("shm", SHARED_MEMORY), FOLDER_S, mounted),
        Check("versions and code", read_versions, product_s, "the environment's file system is very slow"),
        Check(f"run folder {run_folder}", lambda: check_shared(run_folder, token_file, request["token"]),
              FOLDER_S, mounted),
        *[Check(f"data folder {folder}", lambda path=Path(folder): check_readable(path), FOLDER_S, mounted)
          for folder in request["data_folders"]],
        Check("port", lambda: check_port(request["host"])),
        Check("limit of open files", lambda: {"open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}),
        Check("cores", lambda: {"cores": count_cores()}),
        Check("leftovers", find_leftovers, is_information=True),
        Check("system", describe_system, is_information=True),
        Check("nvidia-smi", read_nvidia_smi, TOOL_S + 1, is_information=not request["gpus"],
              advice="its driver hangs: the node needs a reboot"),
    ]


def check_product(arguments: list[str], limit_s: float) -> dict:
    """A right matrix product on each device, by a process of its own: for GPUs it needs torch.

    Raises:
        LaunchError: a wrong product, a device that fails, no answer.
    """
    one_core = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run([sys.executable, "-m", *arguments], env=os.environ | one_core,
                              capture_output=True, text=True, timeout=limit_s, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"matrix product: no answer within {limit_s:g} s: a device hangs, or imports take that"
                          " long here (a busy node, a slow file system)") from None
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LaunchError(f"matrix product: failed with exit code {done.returncode}: {tail}")
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    for result in facts["devices"]:
        if result.get("error"):
            raise LaunchError(f"matrix product: {result['device']} failed: {result['error']}")
        if any(result["wrong"].values()):
            counts = ", ".join(f"{num} wrong rows in {kind}" for kind, num in result["wrong"].items() if num)
            raise LaunchError(f"matrix product: {result['device']} computes wrong results ({counts}): a damaged device,"
                              " take the node out of service")
    return facts


def measure_memory() -> dict:
    """Memory that can be had, in GiB: of the machine, and of the control groups that this process is in."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return {"memory_gib": round(min([available, *_group_room()]) / GIB, 3)}


def measure_disk(name: str, folder: Path) -> dict:
    """Space free for this user where a folder lies, in GiB.

    Raises:
        LaunchError: no file can be made there for want of inodes.
    """
    system = os.statvfs(folder)
    if system.f_files and not system.f_favail:
        raise LaunchError(f"{folder}: no inodes left: too many small files there; see `df -i {folder}`")
    return {f"{name}_gib": round(system.f_bavail * system.f_frsize / GIB, 3), f"{name}_path": str(folder)}


def read_versions() -> dict:
    """Versions of what must be the same on all nodes, and a digest of our own code."""
    versions = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"versions": versions | {"code": fingerprint_code(Path(__file__).resolve().parents[2])}}


def fingerprint_code(root: Path) -> str:
    """SHA-256 over the Python files of megascale and launcher, with their names; 16 digits of it."""
    digest = hashlib.sha256()
    for top in ("launcher", "megascale"):
        for path in sorted((root / top).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def check_shared(folder: Path, token_file: Path, token: str) -> dict:
    """The run folder can be written, and is the one that the controller sees.

    Raises:
        LaunchError: it can't, or isn't.
    """
    probe = folder / f".preflight_{socket.gethostname()}_{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("xb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        raise LaunchError(f"run folder {folder}: can't be written ({error.strerror}): wrong owner, a full or"
                          f" read-only file system? try `touch {folder}/x`") from None
    deadline_s = time.monotonic() + TOKEN_WAIT_S
    while True:
        try:
            os.listdir(token_file.parent)  # NFS then asks its server anew for names that it knew to be missing
            found = token_file.read_text()
        except FileNotFoundError:
            found = None
        if found == token:
            return {"is_shared": True}
        if time.monotonic() > deadline_s:
            what = "isn't there" if found is None else "has other content"
            raise LaunchError(f"run folder {folder}: not the same as the controller's: {token_file.name}, written by"
                              f" it, {what} on this node. Is {folder} on a file system that all nodes share and mount?")
        time.sleep(0.1)


def check_readable(folder: Path) -> dict:
    """A data folder and its first file can be read.

    Raises:
        LaunchError: they can't.
    """
    try:
        with os.scandir(folder) as entries:
            first = next((entry for entry in entries if entry.is_file()), None)
        if first is not None:
            with open(first.path, "rb") as file:
                file.read(1)
    except OSError as error:
        where = error.filename or folder
        raise LaunchError(f"data folder {where}: can't be read ({error.strerror}): is it mounted on this node, and are"
                          " its permissions right?") from None
    return {}


def check_port(host: str) -> dict:
    """A port can be had at this node's address.

    Raises:
        LaunchError: it can't.
    """
    try:
        with socket.create_server((host, 0)) as server:
            return {"address": server.getsockname()[0]}
    except OSError as error:
        raise LaunchError(f"port: can't listen at {host} ({error.strerror or error}): isn't it this node's address?"
                          " see `ip addr`, and `interface` in the cluster's file") from None


def find_leftovers() -> dict:
    """Ranks of this user that run already; another job's, or what an earlier one left behind."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == os.getuid() and RANK_MODULE in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return {"leftover_ranks": sorted(found)}


def describe_system() -> dict:
    """What helps to understand a report later: kernel, load, umask."""
    lines = Path("/proc/self/status").read_text().splitlines()
    umask = next((line.split()[1] for line in lines if line.startswith("Umask:")), None)
    return {"kernel": platform.release(), "load": round(os.getloadavg()[0], 2), "umask": umask}


def read_nvidia_smi() -> dict:
    """Each GPU's name, memory in use, temperature and uncorrected memory errors; nothing where there is no nvidia-smi.

    Raises:
        LaunchError: it fails or doesn't answer.
    """
    if not shutil.which("nvidia-smi"):
        return {}
    asked = "name,memory.used,temperature.gpu,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S, check=False)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"nvidia-smi: no answer within {TOOL_S:g} s: the driver hangs, the node needs a reboot"
                          ) from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise LaunchError(f"nvidia-smi: exit code {done.returncode}: {said[-1] if said else 'it said nothing'}")
    return {"nvidia_smi": done.stdout.strip().splitlines()}


def _group_room() -> list[int]:
    """Bytes below the limit of each control group around this process (version 2), for those that have one."""
    root, rooms = Path("/sys/fs/cgroup"), []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    except OSError:
        return []
    group = None if own is None else root / own
    while group is not None and group.is_relative_to(root):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            rooms.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
        group = group.parent
    return rooms
