"""Training of the survivors that take over the work of removed blocks.

The meaning of healing for a candidate (its pairs) is data and lives with the candidates; this room
trains pairs and keeps their tensors.
"""
