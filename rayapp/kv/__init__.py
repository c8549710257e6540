"""KV between the stages: segments, the choice of entries, their wire format and their byte count.

Invariant: an entry is a key (already rotated), a value and the position it was computed at, so
dropping other entries never moves it; blocks keep their original numbers. Rejected: one tensor for
all blocks, because plans cut each block to its own length, and pickled tensors, because KV crosses
a trust boundary.
"""
