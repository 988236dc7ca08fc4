"""Checks that need several processes: all of them run in one group, because its start takes seconds."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn

Check = Callable[..., None]


def outcomes(
    processes: int, folder: Path, begin: Callable[[Path], tuple[Any, ...]], checks: Mapping[str, Check]
) -> dict[str, str]:
    """Run checks in a group of processes. What each raised in any process, by name; empty: nothing.

    `begin` gets the folder and returns the arguments of the checks. It and the checks are functions of a module.
    """
    otherwise = ""
    try:
        spawn(_run, (processes, folder, begin, dict(checks)), nprocs=processes)
    except ProcessException as error:  # a check that raises in one process alone ends the group
        otherwise = f"it did not run to its end: {error}"
    files = [folder / f"{rank}.json" for rank in range(processes)]
    found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return {name: "\n".join(filter(None, (one.get(name, otherwise) for one in found))) for name in checks}


def _run(rank: int, processes: int, folder: Path, begin: Callable[[Path], Any], checks: dict[str, Check]) -> None:
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{processes}"}
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    # A process that raises where the others wait for it must not keep them for half an hour.
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=processes, rank=rank)
    subject = begin(folder)
    found = {}
    for name, check in checks.items():
        try:
            check(*subject)
            found[name] = ""
        except BaseException:
            found[name] = f"in process {rank}: {traceback.format_exc()}"
        (folder / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()
