"""The way of a prompt with its KV into a decode replica: a booking, a slot, a lease, pages."""
