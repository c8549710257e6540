"""KV between the stages: what a segment is, which entries travel, how they travel, what they weigh.

Invariant: an entry is a key (already rotated), a value and the position it was computed at, so
dropping others never moves it; blocks keep their original numbers. Rejected: one tensor for all
blocks, because plans cut each block to its own length, and pickled tensors, because KV crosses a
trust boundary.
"""
