"""The original (vec2text) as a child process in its own environment: jobs (upstream.py) and searches (serve.py)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Self

import numpy as np

from v2t_jax.bench.measure import Turn, num_cores

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-upstream" / "bin" / "python"


def command(reproducible: bool, script: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """A script of this folder as a command, and its environment: the rest of ours is none of the original's.

    Reproducible: with one thread, far quicker than two for the small jobs of tests, and with an MKL that rounds
    alike in every process, wherever its arrays lie.
    """
    assert PYTHON.exists(), f"{PYTHON} is missing: `make oracle` makes it"
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": str(num_cores())}
    if reproducible:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
    # The allocator of both sides is the same (`make benchvs`), and so is the GPU.
    both = ("MALLOC_", "CUDA_", "LD_LIBRARY_PATH")
    environment |= {name: value for name, value in os.environ.items() if name.startswith(both)}
    return [str(PYTHON), str(ROOT / "tests" / "oracle" / script), *arguments], environment


def run_upstream(*jobs: list[Any]) -> None:
    """Jobs of upstream.py."""
    line, environment = command(True, "upstream.py", json.dumps(jobs))
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


class Original:
    """serve.py at work on the pair of a folder, which it makes first if it's given a spec; used by `with`."""

    def __init__(self, folder: Path, spec: dict[str, Any] | None = None, reproducible: bool = False) -> None:
        arguments = [str(folder), *([json.dumps(spec)] if spec else [])]
        line, environment = command(reproducible, "serve.py", *arguments)
        self.folder, self._log = folder, folder / "serve.log"
        with self._log.open("w") as log:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(line, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=log)
        self.about: dict[str, str] = self._answer()

    def invert(self, e: np.ndarray, num_steps: int | None, width: int, max_length: int) -> tuple[Turn, list[str]]:
        """Its seconds for one search for the texts of e [n, E], and the texts. See serve.py for the settings."""
        file = self.folder / "vectors.npy"
        np.save(file, e)
        asked = {"vectors": str(file), "num_steps": num_steps, "sequence_beam_width": width, "max_length": max_length}
        assert self.process.stdin is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        answer = self._answer()
        return Turn(answer["wall"], answer["cpu"]), answer["texts"]

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the original has ended: {self._log.read_text()[-3000:]}"
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends stdin, and so the process."""
        self.process.communicate()
