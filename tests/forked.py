"""Runs scripts of the kit in processes forked from one with the imports done: a start takes half a second.

They are killed, counted and launched in numbers by the tests; what a user types is tested elsewhere.
"""

import ctypes
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "accelerate", "datasets", "transformers.models.llama.modeling_llama", "transformers.generation"]
)


def kill_before(event: int, folder: str, how: int = signal.SIGKILL) -> None:
    """SIGKILL to this process before its `event`-th file event in `folder`, from 1; half a write may be done."""
    seen = 0

    def count() -> bool:
        nonlocal seen
        seen += 1
        return seen == event

    def hook(name: str, details: tuple) -> None:
        changes = ("os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir", "os.link", "os.symlink")
        writes = name == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        here = any(str(detail).startswith(folder) for detail in details[:2])
        locks = name == "fcntl.flock"  # it has no path
        if (((writes or name in changes) and here) or locks) and count():
            os.kill(os.getpid(), how)

    def half_written(descriptor: int, data, write=os.write) -> int:  # what no audit event tells of
        if str(os.readlink(f"/proc/self/fd/{descriptor}")).startswith(folder) and count():
            write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    os.write = half_written
    sys.addaudithook(hook)


def _main(script, arguments: list[str], environment: dict[str, str], folder: str, limit, kill: tuple, powers: bool):
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    import huggingface_hub
    import torch

    huggingface_hub.constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"  # else read at import
    torch.set_num_threads(1)  # threads of the parent do not live on in a fork
    if kill:
        kill_before(*kill)
    if not powers:  # a file's mode binds this process then, even if it is root's (Linux: no capabilities)
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0
    sys.argv, sys.path[0] = [script, *arguments], str(ROOT)
    os.chdir(ROOT)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Launch:
    """`processes` copies of one script, as `accelerate launch` starts them; if one fails, all end.

    limit: the largest file in bytes; kill: see `kill_before`; powers: whether root may write where modes forbid it.
    """

    def __init__(self, script, *arguments, processes=1, limit=None, kill: tuple = (), powers=True, **environment):
        self.folder, self.running = tempfile.mkdtemp(), []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(processes):
            Path(self.folder, str(rank)).mkdir()
            own = dict(environment)
            if processes > 1:
                names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                values = (rank, rank, processes, processes, "127.0.0.1", port)
                own |= dict(zip(names, map(str, values), strict=True))
            target = (str(ROOT / script), [*map(str, arguments)], own, f"{self.folder}/{rank}", limit, kill, powers)
            process = CONTEXT.Process(target=_main, args=target)
            process.start()
            self.running.append(process)

    def over(self) -> bool:
        """True if no process runs any more; a failed one takes the others with it."""
        codes = [process.exitcode for process in self.running]
        if any(codes):  # neither None nor 0
            self.kill()
        return None not in codes

    def kill(self) -> None:
        """SIGKILL to all."""
        for process in self.running:
            process.kill()
        for process in self.running:
            process.join()

    def kill_when(self, condition, wait: float = 0.0) -> bool:
        """SIGKILL to all, `wait` seconds after the condition holds; False if they had ended before."""
        end = time.time() + 200
        while not self.over() and time.time() < end and not condition():
            time.sleep(0.001)
        time.sleep(wait)
        over = self.over()
        self.kill()
        return not over

    def finish(self, timeout: float = 300) -> tuple[int, str, str]:
        """(the first exit code that is not 0, or 0; output; error output), when all have ended."""
        end = time.time() + timeout
        while not self.over():
            assert time.time() < end, f"still running: {self.read('out')} {self.read('err')}"
            time.sleep(0.01)
        codes = [process.exitcode for process in self.running]
        positive = [code for code in codes if code and code > 0]
        return next(iter(positive), max(map(abs, codes))), self.read("out"), self.read("err")

    def read(self, name: str) -> str:
        return "".join(Path(self.folder, str(r), name).read_text() for r in range(len(self.running)))


def contents(folder: Path) -> dict[str, bytes]:
    """A run's files but its records and locks; one that a kill has left half written would be among them."""
    files = [file for file in folder.rglob("*") if file.is_file() and "args" not in file.name]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def check_kills(stage: str, start: Path, options: tuple, folder: Path) -> tuple[int, int]:
    """Kills a stage before every one of its file events, each time in a copy of the folder `start`: (kills, refusals).

    The same command must then give the same bytes, without --overwrite where the stage had begun. Meanwhile its record
    says that it is not complete, or all is as it was, or all is there (and of stage 6 a last checkpoint).
    """

    def begin(run_dir: Path, *options, **kill) -> Launch:
        return Launch(f"{stage}.py", "--run_dir", run_dir, *options, **kill)

    def record_of(run_dir: Path) -> dict:
        return common.read_record(run_dir / f"{stage[:2]}_args.json")

    code, _, err = begin(shutil.copytree(start, folder / "whole"), *options).finish()
    assert code == 0, err
    old, whole, before = contents(start), contents(folder / "whole"), record_of(start).get("args")
    rest = tuple(option for option in options if option != "--overwrite")
    kills, refusals, event, killed = 0, 0, 1, [True]
    while all(killed):  # until it comes to its end
        folders, again = [shutil.copytree(start, folder / str(e)) for e in (event, event + 1)], []  # two cores
        launches = [begin(run_dir, *options, kill=(e, str(run_dir))) for e, run_dir in enumerate(folders, event)]
        killed = [launch.finish()[0] != 0 for launch in launches]
        for run_dir in folders:
            record = record_of(run_dir)
            begun, complete = record.get("args") != before, record.get("complete", False)
            refusals += not complete
            assert not complete or (whole if begun else old).items() <= contents(run_dir).items()
            again.append(begin(run_dir, *(rest if begun else options)))
        assert [launch.finish()[0] for launch in again] == [0, 0], [launch.read("err") for launch in again]
        for run_dir in folders:
            assert contents(run_dir) == whole and record_of(run_dir)["complete"]
            shutil.rmtree(run_dir)
        kills, event = kills + sum(killed), event + 2
    return kills, refusals
