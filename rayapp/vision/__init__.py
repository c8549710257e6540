"""Visual tokens: images are encoded, and only the tokens that matter enter the prompt; torch only.

An image is decoded safely (``images``), encoded once by the vision tower (``llava``), and cut into
pools of tokens that compete for one budget (``layout``). The pools are pruned (``tokens`` is
TrimTokenator, ``methods`` has the baselines, ``budgets`` shares tokens between images), and the
kept tokens take their place among the embeddings of the prompt (``prompt``).

Invariant: kept tokens stay in prompt order, and with all tokens kept the language model's input is
the dense model's, bit for bit. Rejected: pruning by a shorter run of placeholder ids in the model's
own ``forward``; it hides positions, and the engines run blocks on embeddings anyway.
"""
