"""Methods that choose visual tokens: one file per method, with its paper.

A method maps a :class:`~rayapp.vision.methods.pool.TokenPool` and a number of tokens to keep to
indices in ascending order. Ties go to the lowest index. A detail that differs from the paper is
marked as a project default.
"""
