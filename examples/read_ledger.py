"""Check which samples a run has trained on: recompute the hash of each logged step from the shards alone.

    python examples/read_ledger.py runs/quickstart

Every training row of metrics.jsonl has `samples_hash`, a hash of the keys of that step's samples. Their order is a
function of the index, the seed and the global batch, so anybody with the shards can compute it.
"""

# %% [markdown]
# # The ledger of a run
# `config.yaml` in the run folder repeats the run, so it says which samples come next, too.

# %%
import sys
from pathlib import Path

import fastvit_engine as fastvit
from fastvit_engine.data import prepare_data
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.train.step import hash_keys

run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
config = fastvit.load_config(str(run / "config.yaml")).config
rows, _ = read_metrics(run / "metrics.jsonl")
logged = {row["step"]: row["samples_hash"] for row in rows if "samples_hash" in row}

# %% [markdown]
# ## Compute it again
# One process reads the global batch of each step: the run may have had any number of them.

# %%
batch = config.train.global_batch_size
data = prepare_data(config, world_size=1, index_folder=run)
batches = data.train_batches(config, rank=0, world_size=1, micro_batch_size=batch, consumed=0, pin_memory=False)
wrong = []
for step, found in zip(range(1, max(logged) + 1), batches, strict=False):
    if step in logged and f"{hash_keys(found.keys):016x}" != logged[step]:
        wrong.append(step)
    if step == 1:
        print("the first samples of step 1:", *found.keys[:4])
print(f"{len(logged)} logged steps of {run}: {len(logged) - len(wrong)} as computed from the shards")
if wrong:
    sys.exit(f"steps {wrong[:5]} trained on others: shards, seed or batch size have changed, or a rewind skipped some")
