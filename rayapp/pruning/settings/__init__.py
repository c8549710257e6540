"""Settings in three: what is scored, where it is computed, how it is searched.

Whoever needs one of them takes that one. A field's name is the option of the command line that
fills it, and its description is the option's help.

Invariant: importing this room loads neither torch nor transformers nor ray, because the command
line is made of it.
"""
