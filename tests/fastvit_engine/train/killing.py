"""An objective that kills its process in a step of its choice: what a test of a kill at a known moment trains with.

FASTVIT_TEST_KILL is "RANK STEP FILE": that rank is killed in its STEP-th forward pass, unless the file is there, which
it then is.
"""

import os
import signal
from pathlib import Path

from fastvit_engine.objectives.classify import Classify


class Killing(Classify):
    passes = 0  # of this process

    def losses(self, model, batch):
        rank, step, file = os.environ["FASTVIT_TEST_KILL"].split(" ", 2)
        self.passes += 1
        if os.environ["RANK"] == rank and self.passes == int(step) and not Path(file).exists():
            Path(file).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch)
