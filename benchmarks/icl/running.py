"""Run jobs in processes, and keep what is done."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from .. import records
from ..errors import BenchmarkError
from . import latency
from .jobs import do
from .rows import Job, Row


def planned(rows: Iterable[Row], jobs: Iterable[Job]) -> list[Row]:
    """The rows of these jobs, and the times, which are of none."""
    wanted = set(jobs)
    return [row for row in rows if row.job in wanted or row.what in latency.WHAT]


def _end_with_parent() -> None:
    """Let this process end when the command is killed. Otherwise it would work on, unseen, for an hour and more."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def wait() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def measure(jobs: Sequence[Job], rows: list[Row], path: Path, processes: int) -> list[Row]:
    """Run the jobs that have no rows yet. The rows of each job are written as soon as it ends.

    Raises:
        BenchmarkError: some jobs failed; all others have been done before.
    """
    jobs = list(dict.fromkeys(jobs))
    rows = planned(rows, jobs)
    done = {row.job for row in rows}
    missing = [job for job in jobs if job not in done]
    machine, failed = records.this_machine(torch.device("cpu")), []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, context, _end_with_parent) as pool,
        tqdm(total=len(missing), unit="job", file=sys.stderr) as bar,
    ):
        waiting: dict[Future[list[Row]], Job] = {pool.submit(do, job): job for job in missing}
        try:
            for future in as_completed(waiting):
                job = waiting[future]
                bar.set_description(f"{job.world} {job.task} {job.method} {job.seed}")
                try:
                    found = future.result()
                except BrokenExecutor:  # a process was killed: none of the jobs that wait can run
                    raise
                except Exception as error:  # of whatever kind: hours of other jobs are to follow
                    failed.append(f"{job}: {type(error).__name__}: {error}")
                    continue
                rows += records.stamped(found, machine)
                records.write(path, rows, Row)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise BenchmarkError("\n".join([f"{len(failed)} of {len(missing)} jobs failed:", *failed]))
    return rows
