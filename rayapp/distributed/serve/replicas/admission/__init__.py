"""The way of a prompt with its KV into a decode replica: slots, leases on them, pages, copies."""
