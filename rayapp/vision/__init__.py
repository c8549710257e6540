"""Images in, the visual tokens that matter through; torch only.

An image is decoded safely (``images``), encoded once by the vision tower (``llava``), cut into
pools of tokens that compete for one budget (``layout``), pruned there (``tokens`` is TrimTokenator,
``methods`` holds the baselines, ``budgets`` shares tokens between images), and what is kept takes
its place among the embeddings of the prompt (``prompt``).

Invariant: whatever is kept stays in prompt order, and with everything kept the language model's
input is the dense model's, bit for bit. Rejected: pruning by a shorter run of placeholder ids in
the model's own ``forward``; it hides positions, and the engines run blocks on embeddings anyway.
"""
