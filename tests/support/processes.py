"""Scripts of tests in processes of their own, alone or as a group under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A process that still holds its group when the interpreter ends may abort: gloo's threads run on with the last
# reference. So what the script holds goes first.
EPILOGUE = """
for name in [name for name in globals() if not name.startswith("__")]:
    del globals()[name]
import gc, torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
gc.collect()
"""


def run_script(path: Path, code: str, *arguments: object, processes: int, config: Path | None = None) -> None:
    """Writes a script and runs it to its end, in several processes by torchrun; it must end well.

    Args:
        path: where the script goes.
        code: what it holds.
        arguments: of its command line.
        processes: how many of them there are.
        config: of `accelerate launch`, which then takes torchrun's place.
    """
    path.write_text(code + EPILOGUE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    accelerate += ["--num_processes", str(processes), "--main_process_port", "0"]
    launcher = accelerate if config is not None else torchrun if processes > 1 else [sys.executable]
    elsewhere = filter(None, [os.environ.get("PYTHONPATH")])
    done = subprocess.run(
        [*launcher, str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *elsewhere])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-8000:]
