"""Rules that choose KV, ours and the peers', judged as a plan would be."""
