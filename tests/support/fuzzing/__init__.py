"""A seeded fuzzer of FP8 checkpoints: each case ends in right numbers or in an error of hf_fp8's own tree.

`cases` makes a case of a seed from `bases` and the mutations of config, model, tensors and files (`..._faults`). `meaning` says
what the mutated files mean, `twin` what stock transformers computes from that, `judging` holds the two against each other, and
`workers` runs many cases under limits of time and memory. `__main__` is the command, scripts/fuzz.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
