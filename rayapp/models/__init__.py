"""Models: loading only what a stage needs, a model as blocks and parts, logits as likelihoods.

Invariant: all blocks keep their original numbers in every stage; a skipped part leaves a hole,
never a renumbering, so rotary positions, sliding windows and KV stay aligned between stages.
Rejected: shortening the block list (silently picks wrong masks in hybrid models) and patching
``forward``.
"""
