"""Run jobs in processes, and keep what is done."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from .. import records
from . import latency
from .jobs import do
from .rows import Job, Row


def planned(rows: Iterable[Row], jobs: Iterable[Job]) -> list[Row]:
    """The rows of these jobs, and the times, which are of none."""
    wanted = set(jobs)
    return [row for row in rows if row.job in wanted or row.what in latency.WHAT]


def measure(jobs: Sequence[Job], rows: list[Row], path: Path, processes: int) -> list[Row]:
    """Run the jobs that have no rows yet. The rows of each job are written as soon as it ends."""
    jobs = list(dict.fromkeys(jobs))
    rows = planned(rows, jobs)
    done = {row.job for row in rows}
    missing = [job for job in jobs if job not in done]
    machine = records.this_machine(torch.device("cpu"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool, tqdm(total=len(missing), unit="job", file=sys.stderr) as bar:
        waiting: dict[Future[list[Row]], Job] = {pool.submit(do, job): job for job in missing}
        try:
            for future in as_completed(waiting):
                job = waiting[future]
                bar.set_description(f"{job.world} {job.task} {job.method} {job.seed}")
                rows += records.stamped(future.result(), machine)
                records.write(path, rows, Row)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return rows
