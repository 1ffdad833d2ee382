"""Engines of vLLM in processes of their own, which decode the same prompts and are compared.

Where a machine has room for all of them (CPUs, small teachers), they are loaded one after the other and then decode in
turns, a few prompts each: a machine whose speed drifts is slow or fast for all alike. On GPUs, and where memory is
short, each engine does its whole work before the next is loaded.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import psutil
from rich.progress import Progress

from shared.console import progress
from shared.files import write_json
from shared.vllm_settings import is_cpu_build
from student.drafting.decode import OTHERS, PROGRESS, TURN, Job, Result, read_result

MODULE = "student.drafting.decode"


def run(jobs: Mapping[Path, Job], environment: Mapping[str, str], kv_cache_gib: float = 0.0) -> dict[Path, Result]:
    """Run every job in a process of its own; leaves BASE.json (the result) and BASE.log (what vLLM said).

    Args:
        jobs: by BASE. One that compares with others, of which there may be one, is the last.
        environment: variables that the processes have beside this one's.
        kv_cache_gib: that an engine takes as it is used.

    Raises:
        RuntimeError: if a process fails; the end of its log is in the message. The others are ended then.
    """
    results: dict[Path, Result] = {}
    with progress() as bar:
        waiting = deque(jobs)
        while waiting:
            engines: dict[Path, _Engine] = {}
            try:
                while waiting and (not engines or _is_room_for(len(waiting), [*engines.values()], kv_cache_gib)):
                    base = waiting.popleft()
                    engines[base] = _Engine(jobs[base], base, environment, bar)
                    engines[base].listen()
                while engines:
                    for base, engine in list(engines.items()):
                        if engine.asks == OTHERS and len(engines) > 1:
                            continue
                        engine.go_on()
                        if engine.asks is None:
                            results[base] = engines.pop(base).result()
            finally:
                for engine in engines.values():
                    engine.end()
    return {base: results[base] for base in jobs}


def _is_room_for(more: int, loaded: list[_Engine], kv_cache_gib: float) -> bool:
    """Whether engines like those that are loaded fit beside them on this machine."""
    if not is_cpu_build():
        return False
    largest = max(engine.memory() for engine in loaded)
    coming = len(loaded) * kv_cache_gib * 2**30  # of the loaded ones, whose caches are empty yet
    return psutil.virtual_memory().available > coming + more * (largest + kv_cache_gib * 2**30)


class _Engine:
    """A process of `decode.py`, from its start to its result.

    Attributes:
        asks: what it waits for: `TURN`, or `OTHERS` to have ended; null when it has ended itself.
    """

    def __init__(self, job: Job, base: Path, environment: Mapping[str, str], bar: Progress) -> None:
        base.parent.mkdir(parents=True, exist_ok=True)
        self.asks: str | None = None
        self._name, self._bar = base.name.replace("_", " "), bar
        self._result_file, self._log_file = base.with_suffix(".json"), base.with_suffix(".log")
        self._job_file = base.with_suffix(".job.json")
        self._result_file.unlink(missing_ok=True)
        write_json(self._job_file, asdict(job))
        self._task = bar.add_task(f"decoding {self._name}", total=None, note="starting vLLM")
        self._log = self._log_file.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(self._job_file), str(self._result_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **environment},
        )

    def listen(self) -> None:
        """Until it asks for something or ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == PROGRESS:
                done, total, note = rest.split(" ", 2)
                self._bar.update(self._task, completed=int(done), total=int(total), note=note)
            elif word in (TURN, OTHERS):
                self.asks = word
                return
            else:
                self._log.write(line)
        self.asks = None

    def go_on(self) -> None:
        """Give it what it asks for, and listen."""
        assert self._process.stdin is not None
        if self.asks is not None:
            with contextlib.suppress(BrokenPipeError):  # killed while it waited, as `result` will say
                self._process.stdin.write("\n")
                self._process.stdin.flush()
            self.listen()

    def memory(self) -> int:
        """Resident bytes of the process and its children."""
        process = psutil.Process(self._process.pid)
        return sum(member.memory_info().rss for member in (process, *process.children(recursive=True)))

    def result(self) -> Result:
        """Of a process that has ended.

        Raises:
            RuntimeError: if it failed.
        """
        code = self._process.wait()
        self._log.close()
        if code != 0 or not self._result_file.exists():
            with self._log_file.open(encoding="utf-8") as log:
                last = "".join(deque(log, maxlen=20))
            raise RuntimeError(f"vLLM {self._name} ended with exit code {code}; {self._log_file} ends with\n{last}")
        self._job_file.unlink()
        return read_result(self._result_file)

    def end(self) -> None:
        """Stop it in the middle."""
        self._process.terminate()
        self._process.wait()
        self._log.close()
