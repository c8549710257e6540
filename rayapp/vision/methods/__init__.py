"""One file per way to choose visual tokens, each with its paper.

A method maps a :class:`~rayapp.vision.methods.pool.TokenPool` and a number of tokens to keep to
indices in ascending order. Ties go to the lowest index. What a file does not attribute to its paper
is a project default, and says so.
"""
