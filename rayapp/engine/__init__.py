"""The engine: prefill, slot-based decode and the whole path in one process, without Ray.

Invariant: the answer to one request never depends on which others share its batch (up to the
rounding of batched arithmetic). A prefill engine runs prompts in chunks; a decode engine keeps
one slot per sequence, and every block of a slot has its own number of entries, since plans cut KV
per block. Rejected: a padded batch over one common length (wrong masks once blocks are ragged),
and pages (slots are bounded by ``max_num_seqs x max_model_len``, which is printed at start; pages
would share that memory better, at the price of a gather per block and step).
"""
