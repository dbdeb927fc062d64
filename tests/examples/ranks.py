"""Runs a script once per rank, as torchrun does: `python -m tests.examples.ranks PROCESSES SCRIPT`.

The ranks are forked from a process that has imported what they need, which halves the time.
"""

import os
import runpy
import sys
import traceback

import torch.distributed as dist

from tests.kernels.integrations import conftest  # lets timm import a torchvision of another build

__all__ = ["conftest"]


def main(processes: int, script: str) -> int:
    import timm  # noqa: F401

    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    ranks = []
    for rank in range(processes):
        if (pid := os.fork()) == 0:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({name: str(value) for name, value in (place | numbers).items()})
            try:
                runpy.run_path(script, run_name="__main__")
                sys.stdout.flush()
                os._exit(0)  # the store has its thread in the parent: nothing here may wait for it
            finally:
                traceback.print_exc()
                os._exit(1)
        ranks.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in ranks)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), sys.argv[2]))
