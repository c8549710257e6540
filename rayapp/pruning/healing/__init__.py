"""Training of the survivors that take over the work of removed blocks.

What healing means for a candidate (which pairs it has) is data and lives with the candidates;
this room trains pairs and keeps what was trained.
"""
