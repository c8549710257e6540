"""Models: loading the tensors of a stage, realising a plan block by block, likelihoods of logits.

Invariant: all blocks keep their original numbers in every stage. A skipped part leaves a hole and
never a renumbering, so rotary positions, sliding windows and KV stay aligned between stages.
Rejected: shortening the block list (silently picks wrong masks in hybrid models) and patching
``forward``.
"""
