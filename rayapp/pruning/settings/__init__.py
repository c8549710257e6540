"""Settings in three groups: the score, the compute, and the search.

A function takes only the groups that it needs. A field's name is the option of the command line
that fills it, and its description is the option's help.

Invariant: importing this room loads neither torch nor transformers nor ray, because the command
line is made of it.
"""
